"""Which row tiles a kernel visits for which group: plain arrays, computed before the kernel and prefetched into scalar memory.

Rows are sorted by group but groups end anywhere, so that a row tile may hold rows of several groups. A *visit* is one (group,
row tile) pair that share rows. Visits are in the order of the rows: all visits of a tile follow each other, and so do all visits
of a group. With T row tiles and e0 groups there are at most T + e0 - 1 of them, and how many there are is data: the kernels' grid
has that length, so that no visit is spent on nothing.

Both functions are pure in `group_sizes`; when several matmuls of a layer use the same row tiles, XLA computes the visits once.
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
      source: the row tile to read: `tile`, except that visits without rows of the group re-read a neighbour.
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
    """Visits that touch every row tile: those without a computed row come once, to be filled with zeros."""
    start, end = _bounds(group_sizes, group_offset, num_groups)
    num_tiles = -(-m // tile_rows)
    empty = end == start
    # Tiles before and after all computed rows form two more segments. They name the groups next to them, whose matrices are
    # in use anyway.
    nothing = jnp.all(empty)
    before = jnp.where(nothing, num_tiles, start[0] // tile_rows)
    after = jnp.where(nothing, num_tiles, _tiles(end[-1], tile_rows))
    first_group, last_group = jnp.argmin(empty), num_groups - 1 - jnp.argmin(empty[::-1])
    segments = _Segments(
        first_tile=_around(0, start // tile_rows, after),
        num_tiles=_around(before, jnp.where(empty, 0, _tiles(end, tile_rows) - start // tile_rows), num_tiles - after),
        group=_around(first_group, jnp.arange(num_groups), last_group),
        start=_around(0, start, 0),
        end=_around(0, end, 0),
    )
    return _visits(segments, start[0], end[-1], num_tiles, tile_rows)


def group_visits(group_sizes: Int[Array, "e"], group_offset: Array, num_groups: int, m: int, tile_rows: int) -> Visits:
    """Visits that touch every group: empty ones come once, to be filled with zeros. Tiles without a computed row do not come."""
    start, end = _bounds(group_sizes, group_offset, num_groups)
    num_tiles = jnp.where(end == start, 1, _tiles(end, tile_rows) - start // tile_rows)
    segments = _Segments(start // tile_rows, num_tiles, jnp.arange(num_groups), start, end)
    return _visits(segments, start[0], end[-1], -(-m // tile_rows), tile_rows)


class _Segments(NamedTuple):
    """Runs of consecutive row tiles, one per group (and two around them)."""

    first_tile: Int[Array, "s"]
    num_tiles: Int[Array, "s"]
    group: Int[Array, "s"]
    start: Int[Array, "s"]
    end: Int[Array, "s"]


def _visits(segments: _Segments, first: Array, last: Array, num_tiles: int, tile_rows: int) -> Visits:
    length = max(num_tiles, 1) + segments.group.shape[0] - 1
    ends = jnp.cumsum(segments.num_tiles)
    begins = ends - segments.num_tiles
    v = jnp.arange(length)[:, None]
    inside = (begins <= v) & (v < ends)

    def of_visit(values: Array) -> Array:
        # A masked sum over a handful of segments rather than a gather: it fuses.
        return jnp.sum(jnp.where(inside, values, 0), axis=1, dtype=jnp.int32)

    tile = of_visit(segments.first_tile + v - begins)
    low = jnp.minimum(first // tile_rows, num_tiles - 1)
    source = jnp.clip(tile, low, jnp.maximum(_tiles(last, tile_rows) - 1, low))
    group, start, end = (of_visit(a) for a in (segments.group, segments.start, segments.end))
    return Visits(group, tile, source.astype(jnp.int32), start, end, ends[-1].astype(jnp.int32))


def _bounds(group_sizes: Array, group_offset: Array, num_groups: int) -> tuple[Array, Array]:
    ends = jnp.cumsum(group_sizes.astype(jnp.int32))
    starts = ends - group_sizes.astype(jnp.int32)
    return tuple(jax.lax.dynamic_slice(a, (group_offset,), (num_groups,)) for a in (starts, ends))


def _tiles(rows: Array, tile_rows: int) -> Array:
    return (rows + tile_rows - 1) // tile_rows


def _around(before: Array | int, middle: Array, after: Array | int) -> Array:
    return jnp.concatenate([jnp.asarray(before)[None], middle, jnp.asarray(after)[None]]).astype(jnp.int32)
