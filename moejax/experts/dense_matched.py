"""Feed-forward experts that start as pieces of one wide layer (sigma-MoE, Csordas et al. 2023)."""

import math
from typing import Literal

import flax.linen as nn

from moejax.core.errors import check_choice
from moejax.core.params import Initializer, per_expert
from moejax.experts.ffn import FFN
from moejax.experts.registry import banks


@banks.register("dense_matched_ffn")
class DenseMatchedFFN(FFN):
    """`FFN` whose matrices start with the standard deviations of a dense layer as wide as all experts together:
    sqrt(2 / (d L)) for W_in and sqrt(2 / (e f L)) for W_out, in a network of L layers.

    So a sum of k experts with unnormalised gates of about 1/2 starts no larger than the dense layer. Fields as in `FFN`, and

    Attributes:
      num_layers: L; a config fills in the model's.
      fan_in: of W_out: 'all' experts' hidden units (the paper), or one 'expert's (its ablation).
    """

    activation: str = "relu"
    num_layers: int = 1
    fan_in: Literal["all", "expert"] = "all"

    def __post_init__(self) -> None:
        check_choice("fan_in", self.fan_in, ("all", "expert"))
        super().__post_init__()

    def initializers(self, d: int) -> tuple[Initializer, Initializer]:
        width = self.hidden * (self.num_experts if self.fan_in == "all" else 1)
        return tuple(per_expert(nn.initializers.normal(math.sqrt(2 / (n * self.num_layers)))) for n in (d, width))
