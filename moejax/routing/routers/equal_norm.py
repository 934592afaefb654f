"""A linear router that starts with all experts' vectors equally long (sigma-MoE, Csordas et al. 2023)."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.core.context import Context
from moejax.core.fields import Count
from moejax.core.layer import RowWise
from moejax.core.params import param
from moejax.routing.routers.base import Router, float32_dot, routers


@routers.register("equal_norm")
class EqualNorm(Router, RowWise):
    """`logits = x W`, where the columns `W[:, e]` start with one length and the whole with standard deviation sqrt(2 / (d L)).

    So at the start the angle between a token and an expert's vector alone decides, and no expert is favoured.

    Attributes:
      num_experts: e.
      num_layers: L; a config fills in the model's.
    """

    num_layers: Count = 1

    @nn.compact
    def __call__(self, x: Float[Array, "g n d"], ctx: Context) -> Float[Array, "g n o"]:
        def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
            w = jax.random.normal(key, shape, dtype)
            w = w / jnp.linalg.norm(w, axis=0, keepdims=True)
            return w * math.sqrt(2 / (shape[0] * self.num_layers)) / w.std()

        w = param(self, "w", init, (x.shape[-1], self.num_outputs), ("embed", None))
        return float32_dot(x.astype(jnp.float32), w)
