"""The usual initialisers, those of `flax.linen.initializers` with names and fields that a config can write.

Like these they are called as `init(key, shape, dtype)`, with inputs on the axis before the last and outputs on the last.
"""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from moejax.core.fields import NonNegative
from moejax.core.initializers.registry import initializers

Shape = tuple[int, ...]


@initializers.register("fan_in")
@dataclasses.dataclass(frozen=True)
class FanIn:
    """Variance `scale / fan_in` (LeCun et al. 1998 with scale 1, He et al. 2015 with 2)."""

    scale: NonNegative = 1.0
    distribution: Literal["truncated_normal", "normal", "uniform"] = "truncated_normal"

    def __call__(self, key: Array, shape: Shape, dtype: Any = jnp.float32) -> Array:
        return nn.initializers.variance_scaling(self.scale, "fan_in", self.distribution)(key, shape, dtype)


@initializers.register("normal")
@dataclasses.dataclass(frozen=True)
class Normal:
    """A normal distribution around 0 with standard deviation `std`."""

    std: NonNegative = 0.02

    def __call__(self, key: Array, shape: Shape, dtype: Any = jnp.float32) -> Array:
        return nn.initializers.normal(self.std)(key, shape, dtype)


@initializers.register("uniform")
@dataclasses.dataclass(frozen=True)
class Uniform:
    """Uniform between `-bound` and `bound`."""

    bound: NonNegative = 0.01

    def __call__(self, key: Array, shape: Shape, dtype: Any = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -self.bound, self.bound)


@initializers.register("orthogonal")
@dataclasses.dataclass(frozen=True)
class Orthogonal:
    """Columns (rows, where these are fewer) orthogonal to each other, each of length `scale` (Saxe et al. 2014)."""

    scale: float = 1.0

    def __call__(self, key: Array, shape: Shape, dtype: Any = jnp.float32) -> Array:
        # Drawn in float32: there is no QR decomposition in less.
        return nn.initializers.orthogonal(self.scale)(key, shape, jnp.float32).astype(dtype)


@initializers.register("zeros")
@dataclasses.dataclass(frozen=True)
class Zeros:
    """All zeros."""

    def __call__(self, key: Array, shape: Shape, dtype: Any = jnp.float32) -> Array:
        return jnp.zeros(shape, dtype)
