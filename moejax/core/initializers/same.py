"""Experts that start alike (SMEAR, Muqeeth et al. 2023: the average of two of them is an expert too)."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from moejax.core.initializers.registry import initializers
from moejax.core.params import Initializer


@initializers.register("same", slots={"init": initializers})
@dataclasses.dataclass(frozen=True)
class Same:
    """One draw of `init` for all experts of a stack."""

    init: Initializer

    def __call__(self, key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        return self.init(key, shape, dtype)

    def stacked(self, key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        """All experts `[e, ...]`; see `moejax.core.params.per_expert`."""
        return self.init(key, shape[1:], dtype)[None].repeat(shape[0], 0)
