"""Losses on routing: pure functions of a layer's `Routing`, weighted by their own `coef` and sown once by the layer.

Published balance losses differ by a factor of k and in what they average over. Here both are explicit, and the scale is fixed:
the balance loss is `coef` times 1 under uniform routing and `coef` times e when one expert takes everything, for every k.
"""

from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from moejax.core.registry import Registry
from moejax.routing.plan import Plan

losses = Registry("loss", "moejax.routing.losses")


@struct.dataclass
class Routing:
    """What a layer decided, for losses and statistics.

    Attributes:
      logits: the router's output, float32.
      probs: each token's distribution over experts, rows summing to 1.
      plan: the plan that was executed.
      valid: False for padding.
    """

    logits: Float[Array, "g n o"]
    probs: Float[Array, "g n e"]
    plan: Plan
    valid: Bool[Array, "g n"]


@runtime_checkable
class Loss(Protocol):
    """A frozen dataclass with a `coef`; calling it gives the weighted scalar."""

    coef: float

    def __call__(self, routing: Routing) -> Float[Array, ""]: ...


def masked_mean(values: Float[Array, "g n *e"], valid: Bool[Array, "g n"], axes: tuple[int, ...]) -> Array:
    """Mean over the valid tokens along `axes` (group and token axes only); 0 where there are none."""
    mask = valid.reshape(*valid.shape, *(1,) * (values.ndim - 2)).astype(values.dtype)
    return (values * mask).sum(axes) / jnp.maximum(mask.sum(axes), 1)
