"""Sums of gathered rows as XLA compiles them well: one gather per choice, whose sum CPU and GPU fuse into one loop.

On TPU each gather is written out and read again, 3 k + 1 times the bytes of a token's row; gathering `[n, k, d]` at once would take
5 k + 1, as its minor axes have to be laid out anew.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def gather_sum(
    source: Float[Array, "s d"], index: Int[Array, "n k"], weight: Float[Array, "n k"] | None
) -> Float[Array, "n d"]:
    """See the package."""
    if weight is None and index.shape[1] == 1:
        return source[index[:, 0]]
    total = jnp.zeros((index.shape[0], source.shape[1]), jnp.float32)
    for j in range(index.shape[1]):
        rows = source[index[:, j]]
        if weight is not None:
            w = weight[:, j, None].astype(jnp.float32)
            rows = jnp.where(w != 0, w * rows, 0)
        total += rows
    return total.astype(source.dtype)


def gather_scale_dot(
    source: Float[Array, "s d"], index: Int[Array, "m"], rows: Float[Array, "m d"], weight: Float[Array, "m"]
) -> tuple[Float[Array, "m d"], Float[Array, "m"]]:
    """See the package."""
    gathered = source[index].astype(jnp.float32)
    return (weight[:, None] * gathered).astype(source.dtype), jnp.sum(gathered * rows, axis=1)
