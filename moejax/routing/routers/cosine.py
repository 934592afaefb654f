"""The cosine router: X-MoE (Chi et al. 2022), Soft MoE (Puigcerver et al. 2023)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.core.context import Context
from moejax.core.fields import Count
from moejax.core.layer import RowWise
from moejax.core.params import param
from moejax.routing.routers.base import Router, float32_dot, routers


@routers.register("cosine")
class Cosine(Router, RowWise):
    """`logits = scale * <x / |x|, w_o / |w_o|>` with a learned scale: X-MoE's cosine router and the router of Soft MoE.

    Attributes:
      num_experts: e.
      projection: width of a linear projection of x before the comparison (X-MoE); None compares x itself (Soft MoE).
      scale_init: initial scale; 1 in Soft MoE, 1 / temperature elsewhere.
      normalise: False drops both norms (Soft MoE's ablation), leaving `scale * <x, w_o>`.
    """

    projection: Count | None = None
    scale_init: float = 1.0
    normalise: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "g n d"], ctx: Context) -> Float[Array, "g n o"]:
        x = x.astype(jnp.float32)
        if self.projection is not None:
            into = param(self, "projection", nn.initializers.lecun_normal(), (x.shape[-1], self.projection), ("embed", None))
            x = float32_dot(x, into)
        w = param(self, "w", nn.initializers.lecun_normal(), (x.shape[-1], self.num_outputs), ("embed", None))
        scale = param(self, "scale", nn.initializers.constant(self.scale_init), (), ())
        if self.normalise:
            x = x * jax.lax.rsqrt(jnp.sum(jnp.square(x), -1, keepdims=True) + 1e-6)
            w = w * jax.lax.rsqrt(jnp.sum(jnp.square(w), 0, keepdims=True) + 1e-6)
        return float32_dot(x, w * scale)
