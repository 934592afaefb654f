"""Grouped matmul as the loops of `pallas_kernels.grouped_map`. A bank of experts is better run whole: see there."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.grouped_map import over_groups


def computed_rows(group_sizes: Int[Array, "e"], group_offset: Array, num_groups: int) -> tuple[Array, Array]:
    """First row, and one past the last row, of the `num_groups` groups from `group_offset` on."""
    ends = jnp.concatenate([jnp.zeros(1, group_sizes.dtype), jnp.cumsum(group_sizes)])
    return ends[group_offset], ends[group_offset + num_groups]


def zero_outside(y: Array, first: Array | int, end: Array) -> Array:
    """`y` with zeros in all rows but first..end-1."""
    row = jnp.arange(y.shape[0])
    return jnp.where(((row >= first) & (row < end))[:, None], y, 0)


def gmm(x: Array, w: Array, group_sizes: Array, group_offset: Array, transpose: bool) -> Array:
    """`y[rows of i] = x[rows of i] @ w[i]`; see the package."""

    def step(matrix: Array, tiles: tuple[Array, ...], inside: Any) -> tuple[tuple[Array, ...], None]:
        return (jax.lax.dot_general(tiles[0], matrix[0], (((1,), (1 if transpose else 0,)), ((), ()))),), None

    e, width = w.shape[0], w.shape[1 if transpose else 2]
    first, _ = computed_rows(group_sizes, group_offset, e)
    sizes = jax.lax.dynamic_slice(group_sizes, (group_offset,), (e,))
    (y,), _, _ = over_groups(step, w, (x,), sizes, first=first, outputs=((width, x.dtype),))
    return y


def tgmm(x: Array, dy: Array, group_sizes: Array, group_offset: Array, num_groups: int) -> Array:
    """`dw[i] = x[rows of i].T @ dy[rows of i]` in float32; see the package."""

    def step(_: Any, tiles: tuple[Array, ...], inside: Array) -> tuple[tuple[()], Array]:
        rows, grads = (jnp.where(inside, a, 0) for a in tiles)
        return (), jax.lax.dot_general(rows, grads, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)

    first, _ = computed_rows(group_sizes, group_offset, num_groups)
    sizes = jax.lax.dynamic_slice(group_sizes, (group_offset,), (num_groups,))
    sums = jax.ShapeDtypeStruct((x.shape[1], dy.shape[1]), jnp.float32)
    _, _, dw = over_groups(step, (), (x, dy), sizes, first=first, sums=sums)
    return dw
