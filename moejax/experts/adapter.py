"""Adapters: small bottlenecks beside a layer (Houlsby et al. 2019; SMEAR, Muqeeth et al. 2023)."""

import flax.linen as nn

from moejax.core.params import Initializer, per_expert
from moejax.experts.ffn import FFN
from moejax.experts.registry import banks


@banks.register("adapter")
class Adapter(FFN):
    """`swish(x W_down + b_down) W_up + b_up` with a narrow hidden layer; starts small. Fields as in `FFN`, and

    Attributes:
      std: standard deviation of both matrices at the start.
      same_start: all experts start equal, so that the average of two experts is an expert too.
    """

    activation: str = "silu"
    use_bias: bool = True
    std: float = 1e-2
    same_start: bool = False

    def initializers(self, d: int) -> tuple[Initializer, Initializer]:
        init = nn.initializers.normal(self.std)
        if self.same_start:
            same = lambda key, shape, dtype=float: init(key, shape[1:], dtype)[None].repeat(shape[0], 0)  # noqa: E731
            return same, same
        return per_expert(init), per_expert(init)
