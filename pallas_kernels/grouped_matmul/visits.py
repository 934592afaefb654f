"""Which row tiles a kernel visits for which group: plain arrays, computed before the kernel and prefetched into scalar memory.

Rows are sorted by group but groups end anywhere, so that a row tile may hold rows of several groups. A *visit* is one (group,
row tile) pair that share rows. Visits are in the order of the rows: all visits of a tile follow each other, and so do all visits
of a group. With T row tiles and e0 groups there are at most T + e0 - 1 of them, and how many there are is data: the kernels' grid
has that length, so that no visit is spent on nothing.

Both functions are pure in `group_sizes`; when several matmuls of a layer use the same row tiles, XLA computes the visits once.
Everything is masked sums over small tables rather than scans, gathers and scalars: those would be one program each on TPU.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


class Visits(NamedTuple):
    """What a kernel is to do, visit by visit; entries past `count` are never visited.

    Attributes:
      group: the group whose matrix is used, counted from `group_offset`.
      tile: the row tile.
      source: the row tile to read: `tile`, except that visits without rows of a group re-read a neighbour.
      start: first row of the group (of the whole array, not of the tile).
      end: one past its last row; `start == end` if the visit computes nothing.
      count: number of visits.
    """

    group: Int[Array, "v"]
    tile: Int[Array, "v"]
    source: Int[Array, "v"]
    start: Int[Array, "v"]
    end: Int[Array, "v"]
    count: Int[Array, ""]


def row_visits(group_sizes: Int[Array, "e"], group_offset: Array, num_groups: int, m: int, tile_rows: int) -> Visits:
    """Visits that touch every row tile, also those without a computed row, which are to be filled with zeros.

    The rows before and after the computed ones are two more segments, whose visits (at most T + e0 + 1 in all) compute nothing
    and name the matrix and the row tile next to them, which are in use anyway.
    """
    start, end = _bounds(group_sizes, group_offset, num_groups)
    first, last = start[:1], end[-1:]
    before = jnp.minimum(jnp.sum(end <= first, keepdims=True), num_groups - 1)
    after = jnp.maximum(num_groups - 1 - jnp.sum(start >= last, keepdims=True), 0)
    group = jnp.concatenate([before, jnp.arange(num_groups), after]).astype(jnp.int32)
    start, end = jnp.concatenate([first * 0, start, last]), jnp.concatenate([first, end, last * 0 + m])
    source = jnp.clip(jnp.concatenate([first, last - 1]), 0, m - 1)
    return _visits(group, start, end, _tiles_of(start, end, tile_rows), source, m, tile_rows)


def group_visits(group_sizes: Int[Array, "e"], group_offset: Array, num_groups: int, m: int, tile_rows: int) -> Visits:
    """Visits that touch every group: empty ones come once, to be filled with zeros. Tiles without a computed row do not come."""
    start, end = _bounds(group_sizes, group_offset, num_groups)
    num_tiles = jnp.maximum(_tiles_of(start, end, tile_rows), 1)
    return _visits(jnp.arange(num_groups), start, end, num_tiles, None, m, tile_rows)


def _visits(
    group: Int[Array, "s"],
    start: Int[Array, "s"],
    end: Int[Array, "s"],
    num_tiles: Int[Array, "s"],
    source_row: Int[Array, "2"] | None,
    m: int,
    tile_rows: int,
) -> Visits:
    """Visits of segments of rows, in order. With `source_row`, the first and the last segment compute nothing and read that row."""
    s, most_tiles = group.shape[0], -(-m // tile_rows)
    ends = _sums_up_to(num_tiles)
    begins = ends - num_tiles
    v = jnp.arange(most_tiles + s - 1)[:, None]
    inside = (begins <= v) & (v < ends)

    def of_visit(values: Array) -> Array:
        return jnp.sum(jnp.where(inside, values, 0), axis=1, dtype=jnp.int32)

    # An empty group at the end of all rows would begin a tile too many.
    tile = jnp.minimum(jax.lax.div(start, tile_rows) + v - begins, most_tiles - 1)
    source = tile
    if source_row is not None:
        segment = jnp.arange(s)
        idle = (segment == 0) | (segment == s - 1)
        source_tile = jax.lax.div(source_row, tile_rows)
        source = jnp.where(idle, jnp.where(segment == 0, source_tile[0], source_tile[1]), tile)
        start, end = jnp.where(idle, 0, start), jnp.where(idle, 0, end)
    group, tile, source, start, end = (of_visit(a) for a in (group, tile, source, start, end))
    return Visits(group, tile, source, start, end, ends[-1])


def _bounds(group_sizes: Array, group_offset: Array, num_groups: int) -> tuple[Array, Array]:
    """First row, and one past the last row, of each of `num_groups` groups."""
    group_sizes = group_sizes.astype(jnp.int32)
    ends = _sums_up_to(group_sizes)
    return tuple(jax.lax.dynamic_slice(a, (group_offset,), (num_groups,)) for a in (ends - group_sizes, ends))


def _sums_up_to(values: Int[Array, "s"]) -> Int[Array, "s"]:
    """Cumulative sums."""
    index = jnp.arange(values.shape[0])
    return jnp.sum(jnp.where(index[None] <= index[:, None], values[None], 0), axis=1, dtype=jnp.int32)


def _tiles_of(start: Array, end: Array, tile_rows: int) -> Array:
    """Number of row tiles that hold rows start..end-1."""
    tiles = jax.lax.div(end + tile_rows - 1, tile_rows) - jax.lax.div(start, tile_rows)
    return jnp.where(end > start, tiles, 0)
