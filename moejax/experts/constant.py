"""Constant experts: a choice that gives a learned vector, whatever the token is (MoE++, Jin et al. 2024)."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.core.context import Context
from moejax.core.fields import Count
from moejax.core.initializers.registry import initializers
from moejax.core.initializers.usual import Normal
from moejax.core.params import Initializer, per_expert
from moejax.dispatch.experts import Experts
from moejax.dispatch.layout import Layout
from moejax.experts.base import Bank
from moejax.experts.registry import banks, declare


@banks.register("constant", slots={"init_v": initializers})
class Constant(Bank):
    """`y = v_e`, a vector of each expert. Tokens stay where they are.

    Attributes:
      num_experts: e.
      init_v: how the vectors start.
    """

    num_experts: Count = 1
    init_v: Initializer = Normal(0.02)

    @nn.compact
    def __call__(self, width: int, ctx: Context | None = None) -> Experts:
        params, axes = declare(self, {"v": (per_expert(self.init_v), (self.num_experts, width), ("expert", "embed"))})
        return Experts(_constant, params, axes, light=True)


def _constant(params: dict[str, Array], x: Float[Array, "*m d"], layout: Layout) -> Float[Array, "*m d"]:
    return jnp.broadcast_to(layout.take(params["v"]).astype(x.dtype), x.shape)
