"""LoRA whose scale falls with the root of its rank (rsLoRA, Kalajdzievski 2023)."""

import math

from moejax.layers.adapters.base import Site
from moejax.layers.adapters.lora import LowRankAdapter
from moejax.layers.registry import adapters


@adapters.register("rs_lora")
class RSLoRA(LowRankAdapter):
    """`y = layer(x) + scale / sqrt(r) * (x A) B`: outputs and gradients keep their size as the rank grows, so that one learning rate
    serves every rank (Kalajdzievski 2023, eq. 2). With `scale / r`, as in LoRA, a larger rank takes smaller steps.

    Fields as in `LowRankAdapter`; `scale` is alpha.

        model = Adapted(model, {"main": RSLoRA(rank=64, scale=16.0, targets=("*/q", "*/v"))})
    """

    def multiplier(self, site: Site) -> float:
        return self.scale / math.sqrt(self.rank_at(site))
