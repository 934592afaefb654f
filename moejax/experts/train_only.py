"""A bank that falls silent outside training: what is the rest of the layer worth without it?"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.core.context import Context
from moejax.dispatch.layout import Layout
from moejax.experts.registry import banks


@banks.register("train_only", slots={"bank": banks})
class TrainOnly(nn.Module):
    """The outputs of `bank` in training, zeros outside it.

    As `shared`, it measures whether routed experts can stand in for the shared one (DeepSeekMoE, Dai et al. 2024, section 4.5).
    """

    bank: nn.Module

    @property
    def num_experts(self) -> int:
        return self.bank.num_experts

    @nn.compact
    def __call__(self, x: Float[Array, "*m d"], layout: Layout, ctx: Context | None = None) -> Float[Array, "*m o"]:
        y = self.bank(x, layout, ctx)
        return y if ctx is not None and ctx.train else jnp.zeros_like(y)
