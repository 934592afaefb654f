"""Experts that start as pieces of one wide layer (sigma-MoE, Csordas et al. 2023)."""

import dataclasses
import math
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from moejax.core.fields import Count
from moejax.core.initializers.registry import initializers
from moejax.core.params import per_expert


@initializers.register("dense_matched")
@dataclasses.dataclass(frozen=True)
class DenseMatched:
    """Standard deviation `sqrt(2 / (fan_in L))`, that of a dense layer in a network of L layers.

    With W_out [f, d] of e experts by the fan-in of 'all', `e f`, they start as pieces of a dense layer as wide as all of them together: a
    sum of k experts with unnormalised gates of about 1/2 starts no larger than that layer.

    Attributes:
      fan_in: inputs of one 'expert', or of 'all' experts of the stack.
      num_layers: L; a config fills in the model's.
    """

    fan_in: Literal["expert", "all"] = "expert"
    num_layers: Count = 1

    def __call__(self, key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        return self._normal(shape[-2])(key, shape, dtype)

    def stacked(self, key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        """All experts `[e, ...]`; see `moejax.core.params.per_expert`."""
        experts = shape[0] if self.fan_in == "all" else 1
        return per_expert(self._normal(shape[-2] * experts))(key, shape, dtype)

    def _normal(self, fan_in: int) -> nn.initializers.Initializer:
        return nn.initializers.normal(math.sqrt(2 / (fan_in * self.num_layers)))
