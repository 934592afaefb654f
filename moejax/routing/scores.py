"""Scores: who is best, and what share each has; exact for scores of any size, and defined where there is nothing to share."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped


def best(scores: Float[Array, "*b e"], k: int) -> Int[Array, "*b k"]:
    """The indices of the k largest scores, the largest first; ties go to the lowest index."""
    # `top_k` ranks 0 above -0, which are equal.
    _, index = jax.lax.top_k(jnp.where(scores == 0, 0, scores), k)
    return index


def take(values: Shaped[Array, "*b e"], expert: Int[Array, "*b k"]) -> Shaped[Array, "*b k"]:
    """The values of these experts."""
    return jnp.take_along_axis(values, expert, axis=-1)


def softmax_over(logits: Float[Array, "*b k"], where: Bool[Array, "*b k"]) -> Float[Array, "*b k"]:
    """The softmax over those of the last axis that `where` says, and 0 for the others: exact however small their sum is."""
    floor = jnp.where(where.any(-1, keepdims=True), -jnp.inf, 0)
    return jnp.where(where, jax.nn.softmax(jnp.where(where, logits, floor), axis=-1), 0)


def shares(values: Float[Array, "*b k"]) -> Float[Array, "*b k"]:
    """Values divided by their sum along the last axis, exact however small they are; where they sum to 0 they stay as they are."""
    size = jax.lax.stop_gradient(jnp.abs(values).max(-1, keepdims=True))
    values = values / jnp.where(size > 0, size, 1)
    total = values.sum(-1, keepdims=True)
    return values / jnp.where(total == 0, 1, total)
