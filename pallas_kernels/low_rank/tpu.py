"""Low-rank grouped matmul on TPU: several groups share the columns of one narrow matmul.

A matrix unit is 128 columns or more wide and a rank is often 8 or 16, so that a matmul per group would leave most of it idle. Here
the groups come in *packs* of `128 // r`: a row tile is multiplied by the A of all groups of a pack at once, columns that are not of a
row's own group are set to zero, and what is left is multiplied by the B of all groups of the pack:

    z = where(row and column are of one group, x[rows, d] @ A[pack * r, d].T, 0)        y = z @ B[pack * r, f]

The kernels visit (pack, row tile) pairs in the order of the rows, and so a pack's matrices are read once. The backward kernel
computes z anew, and from one reading of x and dy sums all three gradients: those of the pack stay in VMEM until its last visit.

A is transposed before the kernel, since an HBM array whose last axis is r is padded to 128 columns; ranks that are no power of
two are padded to one (to a multiple of 128 beyond that), as are groups to whole packs. These copies are of A and B, not of rows.

VMEM: twice each block (rows of x and y, or x, dy and dx; the pack's A and B, and their gradients in float32), a float32 sum of the
row output and a chunk's float32 products: `vmem`. d and f are not tiled; `refuses` says when that is too much.

A pack's matrices have to be finite: zero times infinity in one group's B is NaN in its neighbours' rows.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.grouped_matmul import tpu as grouped_matmul
from pallas_kernels.grouped_matmul.tiles import usable_vmem, vmem_limit
from pallas_kernels.grouped_matmul.visits import Visits, row_visits

_ROWS = (256, 128, 64, 32, 16)  # sizes of row tiles, in order of preference
_CHUNKS = (512, 256, 128)  # of columns that are multiplied at once


class Packs(NamedTuple):
    """How groups share columns.

    Attributes:
      rank: columns of a group.
      groups: groups of a pack.
      count: packs.
    """

    rank: int
    groups: int
    count: int

    @classmethod
    def of(cls, r: int, e: int) -> "Packs":
        rank = pl.next_power_of_2(r) if r <= 128 else pl.cdiv(r, 128) * 128
        groups = min(max(1, 128 // rank), e)
        return cls(rank, groups, pl.cdiv(e, groups))

    @property
    def columns(self) -> int:
        return self.rank * self.groups


def vmem(rows: int, columns: int, d: int, f: int, itemsize: int, backward: bool) -> int:
    """Bytes of VMEM that a kernel takes for its blocks, sums and products."""
    columns, d, f = (pl.cdiv(size, 128) * 128 for size in (columns, d, f))
    blocks = rows * (d + f + (d if backward else 0)) + columns * (d + f)
    gradients = 2 * columns * (d + f) if backward else 0
    products = 3 * max(rows, columns) * max(next((s for s in _CHUNKS if size % s == 0), size) for size in (d, f))
    return 2 * itemsize * blocks + 4 * (rows * (d if backward else f) + gradients + products)


def tile_rows(m: int, columns: int, d: int, f: int, itemsize: int, backward: bool) -> int | None:
    """Rows of a tile: as many as fit, with a fifth to spare, and not many more than there are; None if nothing fits."""
    fit = (rows for rows in _ROWS if 5 * vmem(rows, columns, d, f, itemsize, backward) <= 4 * usable_vmem())
    return next((rows for rows in fit if rows < 2 * m or rows == _ROWS[-1]), None)


def refuses(x: Array, a: Array, b: Array) -> str | None:
    """Why the kernels cannot take these arrays, or None."""
    packs = Packs.of(a.shape[2], a.shape[0])
    sizes = packs.columns, x.shape[1], b.shape[2], x.dtype.itemsize
    if reason := grouped_matmul.refuses(x, a, b):
        return reason
    return None if tile_rows(x.shape[0], *sizes, backward=True) else f"a tile with d={sizes[1]}, f={sizes[2]} exceeds VMEM"


def forward(
    x: Float[Array, "m d"],
    a: Float[Array, "e0 d r"],
    b: Float[Array, "e0 r f"],
    group_sizes: Int[Array, "e"],
    group_offset: Int[Array, ""],
    scale: float,
    rows: int | None = None,
    interpret: bool = False,
) -> Float[Array, "m f"]:
    """`scale * (x A_g) B_g`; see the package."""
    (m, d), f = x.shape, b.shape[2]
    packs = Packs.of(a.shape[2], a.shape[0])
    rows = rows or tile_rows(m, packs.columns, d, f, x.dtype.itemsize, backward=False)
    y = jax.ShapeDtypeStruct((m, f), x.dtype)
    (y,) = _call(partial(_forward, scale), packs, [x], a, b, group_sizes, group_offset, [y], [], rows, interpret, "low_rank")
    return y


def backward(
    x: Float[Array, "m d"],
    dy: Float[Array, "m f"],
    a: Float[Array, "e0 d r"],
    b: Float[Array, "e0 r f"],
    group_sizes: Int[Array, "e"],
    group_offset: Int[Array, ""],
    scale: float,
    rows: int | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "m d"], Float[Array, "e0 d r"], Float[Array, "e0 r f"]]:
    """Gradients of x, a and b, the last two in float32."""
    (m, d), (e0, r, f) = x.shape, b.shape
    packs = Packs.of(r, e0)
    rows = rows or tile_rows(m, packs.columns, d, f, x.dtype.itemsize, backward=True)
    dx = jax.ShapeDtypeStruct((m, d), x.dtype)
    da, db = (jax.ShapeDtypeStruct((packs.count * packs.columns, width), jnp.float32) for width in (d, f))
    dx, da, db = _call(
        partial(_backward, scale), packs, [x, dy], a, b, group_sizes, group_offset, [dx], [da, db], rows, interpret,
        "low_rank_gradients",
    )  # fmt: skip
    # Packs without rows are never visited, and their gradients never written.
    used = jax.lax.dynamic_slice(group_sizes, (group_offset,), (e0,))[:, None, None] > 0
    da, db = (jnp.where(used, gradient.reshape(-1, packs.rank, gradient.shape[1])[:e0, :r], 0) for gradient in (da, db))
    return dx, da.swapaxes(1, 2), db


def _call(
    kernel: Callable[..., None],
    packs: Packs,
    by_row: list[Array],
    a: Array,
    b: Array,
    group_sizes: Array,
    group_offset: Array,
    row_outputs: list[jax.ShapeDtypeStruct],
    pack_outputs: list[jax.ShapeDtypeStruct],
    rows: int,
    interpret: bool,
    name: str,
) -> Sequence[Array]:
    """Runs a kernel over the visits: blocks of `rows` rows of some arrays, and of a pack's columns of others."""
    m, (e0, d, r), f = by_row[0].shape[0], a.shape, b.shape[2]
    spare = packs.count * packs.groups - e0
    a = jnp.pad(a.swapaxes(1, 2), ((0, spare), (0, packs.rank - r), (0, 0))).reshape(-1, d)
    b = jnp.pad(b, ((0, spare), (0, packs.rank - r), (0, 0))).reshape(-1, f)
    bounds = _bounds(group_sizes, group_offset, e0)
    visits = _visits(bounds, packs, m, rows)
    # First row and end of each column's group.
    bounds = jnp.pad(bounds, ((0, 0), (0, spare))).reshape(2, packs.count, packs.groups).swapaxes(0, 1)
    bounds = jnp.repeat(bounds, packs.rank, axis=2)

    def pack_block(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((packs.columns, width), lambda v, *s: (Visits(*s, None).group[v], 0))

    def row_block(width: int, which: str) -> pl.BlockSpec:
        return pl.BlockSpec((rows, width), lambda v, *s: (getattr(Visits(*s, None), which)[v], 0))

    outputs = [*row_outputs, *pack_outputs]
    derive = bool(pack_outputs)
    reserved = vmem_limit(vmem(rows, packs.columns, d, f, by_row[0].dtype.itemsize, derive))
    return pl.pallas_call(
        kernel,
        out_shape=outputs,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(visits.count,),
            in_specs=[
                pl.BlockSpec((None, 2, packs.columns), lambda v, *s: (Visits(*s, None).group[v], 0, 0)),
                *(row_block(x.shape[1], "source") for x in by_row),
                pack_block(d),
                pack_block(f),
            ],
            out_specs=[
                *(row_block(out.shape[1], "tile") for out in row_outputs),
                *(pack_block(out.shape[1]) for out in pack_outputs),
            ],
            scratch_shapes=[pltpu.VMEM((rows, row_outputs[0].shape[1]), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=reserved),
        cost_estimate=pl.CostEstimate(
            flops=2 * m * packs.columns * (d + f) * (3 if derive else 1),
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*by_row, a, b, *outputs)),
            transcendentals=0,
        ),
        interpret=pltpu.InterpretParams(detect_races=True) if interpret else False,
        name=name,
    )(*visits[:5], bounds, *by_row, a, b)


def _bounds(group_sizes: Array, group_offset: Array, e0: int) -> Int[Array, "2 e0"]:
    """First row and end of each group from `group_offset` on."""
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    bounds = jnp.stack([ends - group_sizes.astype(jnp.int32), ends])
    return jax.lax.dynamic_slice(bounds, (0, group_offset), (2, e0))


def _visits(bounds: Int[Array, "2 e0"], packs: Packs, m: int, rows: int) -> Visits:
    """Visits in which a pack is what a group is elsewhere; the rows before the first pack are one more."""
    ends = bounds[1, packs.groups - 1 :: packs.groups]
    if ends.shape[0] < packs.count:
        ends = jnp.append(ends, bounds[1, -1])
    sizes = jnp.diff(jnp.concatenate([jnp.zeros(1, jnp.int32), bounds[0, :1], ends]))
    return row_visits(sizes, jnp.int32(1), packs.count, m, rows)


class _Visit(NamedTuple):
    """What a kernel has to know of its visit.

    Attributes:
      new_tile: the first of its row tile.
      new_pack: the first of its pack.
      own: which columns of the pack are of a row's own group.
      inside: which rows are of the pack.
    """

    new_tile: Bool[Array, ""]
    new_pack: Bool[Array, ""]
    own: Bool[Array, "rows columns"]
    inside: Bool[Array, "rows 1"]

    @classmethod
    def now(cls, visits: Visits, bounds: Any, rows: int) -> "_Visit":
        v = pl.program_id(0)
        before, tile, pack = jnp.maximum(v - 1, 0), visits.tile[v], visits.group[v]

        def row(columns: int) -> Array:
            return tile * rows + jax.lax.broadcasted_iota(jnp.int32, (rows, columns), 0)

        # A visit may compute nothing, and still name a tile and a pack: its rows are then none.
        inside = (row(1) >= visits.start[v]) & (row(1) < visits.end[v])
        return cls(
            new_tile=(v == 0) | (visits.tile[before] != tile),
            new_pack=(v == 0) | (visits.group[before] != pack),
            own=inside & (row(bounds.shape[1]) >= bounds[0:1, :]) & (row(bounds.shape[1]) < bounds[1:2, :]),
            inside=inside,
        )


def _forward(scale: float, *refs: Any) -> None:
    visits, (bounds, x, a, b, y, sum_) = Visits(*refs[:5], None), refs[5:]
    visit = _Visit.now(visits, bounds, x.shape[0])
    z = jnp.where(visit.own, scale * _down(lambda columns: x[:, columns], a), 0).astype(x.dtype)
    _sum(sum_, visit.new_tile, lambda columns: _dot(z, b[:, columns], 1, 0), y)


def _backward(scale: float, *refs: Any) -> None:
    visits, (bounds, x_ref, dy_ref, a, b, dx, da, db, sum_) = Visits(*refs[:5], None), refs[5:]
    visit = _Visit.now(visits, bounds, x_ref.shape[0])

    # Whatever other rows hold, infinities and NaN included, is to be multiplied by zero below.
    def x(columns: Any) -> Array:
        return jnp.where(visit.inside, x_ref[:, columns], 0)

    def dy(columns: Any) -> Array:
        return jnp.where(visit.inside, dy_ref[:, columns], 0)

    z = jnp.where(visit.own, scale * _down(x, a), 0).astype(x_ref.dtype)
    dz = jnp.where(visit.own, scale * _down(dy, b), 0).astype(x_ref.dtype)
    _sum(sum_, visit.new_tile, lambda columns: _dot(dz, a[:, columns], 1, 0), dx)
    _sum(da, visit.new_pack, lambda columns: _dot(dz, x(columns), 0, 0))
    _sum(db, visit.new_pack, lambda columns: _dot(z, dy(columns), 0, 0))


def _down(rows: Callable[[Any], Array], narrow: Any) -> Array:
    """`rows @ narrow.T`, from the wide axis of both to the pack's columns."""
    chunk, count = _chunks(narrow.shape[1])

    def step(i: Array, z: Array) -> Array:
        return z + _dot(rows(chunk(i)), narrow[:, chunk(i)], 1, 1)

    return jax.lax.fori_loop(1, count, step, _dot(rows(chunk(0)), narrow[:, chunk(0)], 1, 1))


def _sum(sum_: Any, new: Array, term: Callable[[Any], Array], out: Any = None) -> None:
    """Adds a term to a sum, or begins a new one, and copies it out so far: only a block's last copy leaves VMEM."""
    chunk, count = _chunks(sum_.shape[1])

    def step(i: Array | int, _: None) -> None:
        total = jnp.where(new, 0, sum_[:, chunk(i)]) + term(chunk(i))
        sum_[:, chunk(i)] = total
        if out is not None:
            out[:, chunk(i)] = total.astype(out.dtype)

    jax.lax.fori_loop(0, count, step, None)


def _chunks(width: int) -> tuple[Callable[[Array | int], Any], int]:
    """Parts of a wide axis, and how many: one part's matmul is one copy of code, and its result is what VMEM holds besides."""
    size = next((size for size in _CHUNKS if width % size == 0), width)
    if size == width:
        return lambda i: slice(None), 1
    return lambda i: pl.ds(i * size if isinstance(i, int) else pl.multiple_of(i * size, size), size), width // size


def _dot(a: Array, b: Array, contract_a: int, contract_b: int) -> Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    numbers = (((contract_a,), (contract_b,)), ((), ()))
    return jax.lax.dot_general(a, b, numbers, precision=precision, preferred_element_type=jnp.float32)
