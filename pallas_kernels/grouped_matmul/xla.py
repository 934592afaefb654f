"""Grouped matmul as loops that XLA compiles well on a CPU: the trip counts follow the group sizes.

The derivative is again two such loops; the transpose that JAX would derive adds a full zero array of the weights per tile.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


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
    first, end = computed_rows(group_sizes, group_offset, w.shape[0])
    sizes = jax.lax.dynamic_slice(group_sizes, (group_offset,), (w.shape[0],))
    return zero_outside(_loop(x, w, sizes, first, transpose), first, end)


def tgmm(x: Array, dy: Array, group_sizes: Array, group_offset: Array, num_groups: int) -> Array:
    """`dw[i] = x[rows of i].T @ dy[rows of i]` in float32; see the package."""
    first, _ = computed_rows(group_sizes, group_offset, num_groups)
    return _weight_gradient(x, dy, jax.lax.dynamic_slice(group_sizes, (group_offset,), (num_groups,)), first)


def tile_rows(m: int, e: int) -> int:
    """Rows of a tile: about a group's mean size, so that few tiles are ragged, within what a matmul needs to run well."""
    return min(128, max(8, 1 << (max(m // max(e, 1), 1) - 1).bit_length()))


@partial(jax.jit, static_argnames="transpose")
def _loop(x: Array, w: Array, group_sizes: Array, first: Array, transpose: bool) -> Array:
    """`x[rows of i] @ w[i]` (or `w[i].T`) group after group. Rows past the last group are left undefined.

    A group's last tile may reach into the next group's rows; those are overwritten when that group's turn comes, which is why
    groups are visited in order and why nothing is padded or masked inside the loop.
    """
    tile = tile_rows(x.shape[0], w.shape[0])
    d, f = (w.shape[2], w.shape[1]) if transpose else (w.shape[1], w.shape[2])
    padded = jnp.pad(x, ((0, tile), (0, 0)))
    contract = (((1,), (1 if transpose else 0,)), ((), ()))

    def group(y: Array, group: tuple[Array, Array, Array]) -> tuple[Array, None]:
        matrix, start, size = group

        def step(t: Array, y: Array) -> Array:
            rows = jax.lax.dynamic_slice(padded, (start + t * tile, 0), (tile, d))
            return jax.lax.dynamic_update_slice(y, jax.lax.dot_general(rows, matrix, contract), (start + t * tile, 0))

        return jax.lax.fori_loop(0, (size + tile - 1) // tile, step, y), None

    starts = first + jnp.cumsum(group_sizes) - group_sizes
    y = jnp.zeros((x.shape[0] + tile, f), x.dtype)
    y, _ = jax.lax.scan(group, y, (w, starts, group_sizes))
    return y[: x.shape[0]]


@jax.jit
def _weight_gradient(x: Array, dy: Array, group_sizes: Array, first: Array) -> Array:
    """`dw[i] = x[rows of i].T @ dy[rows of i]`; zero for empty groups. Accumulates in float32."""
    tile = tile_rows(x.shape[0], group_sizes.shape[0])
    d, f = x.shape[1], dy.shape[1]
    x_padded, dy_padded = (jnp.pad(a, ((0, tile), (0, 0))) for a in (x, dy))

    def group(_: None, group: tuple[Array, Array]) -> tuple[None, Array]:
        start, size = group

        def step(t: Array, dw: Array) -> Array:
            rows = jax.lax.dynamic_slice(x_padded, (start + t * tile, 0), (tile, d))
            grads = jax.lax.dynamic_slice(dy_padded, (start + t * tile, 0), (tile, f))
            inside = (jnp.arange(tile) < size - t * tile)[:, None]
            return dw + jax.lax.dot_general(
                jnp.where(inside, rows, 0), grads, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
            )

        dw = jax.lax.fori_loop(0, (size + tile - 1) // tile, step, jnp.zeros((d, f), jnp.float32))
        return None, dw

    starts = first + jnp.cumsum(group_sizes) - group_sizes
    _, dw = jax.lax.scan(group, None, (starts, group_sizes))
    return dw
