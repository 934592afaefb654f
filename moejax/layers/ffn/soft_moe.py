"""Soft MoE (Puigcerver et al. 2023): the MoE layer with the soft router and soft slots."""

from typing import Literal

import flax.linen as nn
from jaxtyping import Array, Float

from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.core.fields import Count
from moejax.core.layer import Layer
from moejax.experts.base import AnyBank
from moejax.experts.registry import banks
from moejax.layers.ffn.moe import MoE
from moejax.layers.registry import ffns
from moejax.routing.routers.cosine import Cosine
from moejax.routing.select import SoftSlots


@ffns.register("soft_moe", slots={"bank": banks})
class SoftMoE(Layer):
    """Slots are averages of all tokens of a sequence, outputs averages of all slots. Never causal.

    The paper sets `num_experts * slots` to about the number of tokens, which costs what the dense layer costs.

    Attributes:
      bank: the experts.
      num_experts: e.
      slots: slots per expert.
      normalise: compare unit vectors, with a learned scale; False is the paper's ablation.
      dispatch, combine: 'soft', or 'uniform' for the paper's ablation ladder.
    """

    bank: AnyBank
    num_experts: Count
    slots: Count = 1
    normalise: bool = True
    dispatch: Literal["soft", "uniform"] = "soft"
    combine: Literal["soft", "uniform"] = "soft"

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"], ctx: Context | None = None) -> Float[Array, "b s o"]:
        select = SoftSlots(self.slots, self.dispatch, self.combine)
        router = Cosine(self.num_experts, outputs=select.outputs, normalise=self.normalise)
        return MoE(router=router, select=select, bank=self.bank, name="moe")(x, ctx)

    def active_fraction(self) -> float:
        """Every token uses every expert."""
        return 1.0

    def check_causal(self, where: str) -> None:
        """Soft slots average over the whole sequence: always refused in a decoder."""
        raise ConfigError(
            f"{where} (soft_moe) averages over all tokens and leaks the future in a decoder; use a 'moe' layer there"
        )

    def decodable(self) -> str | None:
        return "soft slots average over the whole sequence"
