"""Grouped matmul for NVIDIA GPUs: Pallas kernels that Triton compiles.

A group's rows start anywhere, so its tiles of rows start where the group does. A *visit* is one such tile: a group, its first row
and where its rows end. Triton has no scalar prefetch; XLA works out the table of visits, and each program begins by reading its
line of it. There are at most m / rows + groups + 2 visits, whatever the sizes: that many programs are launched, and those past the
last visit return at once. Rows of no computed group are visits too, with no products to add, so every row of the output is
written by exactly one visit.

    gmm    one program per visit and tile of columns; loops over d
    tgmm   one program per group, tile of d and tile of f; loops over the group's rows, zero times for an empty group

Programs run in bands (`program_order`), so that those that run at a time read few different tiles, and find them in the L2 cache.

Products of bfloat16 and float16 go to the tensor cores as they are; sums are float32. float32 products are exact to float32, off the
tensor cores, unless `jax.default_matmul_precision` asks for something else: 'tensorfloat32' is several times faster.

Resources of a program, from its tiles: shared memory holds `stages` pairs of operand tiles, (rows + columns) * depth * stages
elements (`shared_bytes`); accumulators take rows * columns / (32 warps) of a thread's 255 registers, for each product.

Any d and f are right; those whose rows are not multiples of 16 bytes (8 elements of bfloat16) are copied in smaller pieces, slowly.

Pallas' Triton backend is what jax 0.10 and 0.12 have for all of these chips; jax 0.12 warns that it will leave.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.implementations import current_chip

Ref = Any  # a Pallas reference to an array in the GPU's memory


class Tiles(NamedTuple):
    """Tiles of a kernel; rows, columns and depth are powers of two, 16 or more.

    `rows` x `columns` is the tile of the output that a program computes, and `depth` the part of the contracted axis that a step
    reads. (In `tgmm` the output's rows are of d, and the contracted axis is that of the group's rows.)
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    band: int = 8

    def within(self, **axes: int) -> "Tiles":
        """No larger than axes of these sizes need, as `columns=f`."""
        return self._replace(
            **{side: min(getattr(self, side), max(16, pl.next_power_of_2(max(n, 1)))) for side, n in axes.items()}
        )


def shared_bytes(tiles: Tiles, itemsize: int, lefts: int = 1, rights: int = 1) -> int:
    """Shared memory of a program whose steps read so many tiles of [rows, depth] and of [depth, columns]."""
    return (lefts * tiles.rows + rights * tiles.columns) * tiles.depth * tiles.stages * itemsize


# Bytes of shared memory that a program may have.
SHARED = {"default": 99 << 10, "a100": 163 << 10, "h100": 227 << 10, "h200": 227 << 10, "b200": 227 << 10}

# (operation, bytes of an element, rows of a mean group up to which it holds) -> tiles; the smallest bound that fits is taken.
Table = dict[tuple[str, int, int | float], Tiles]

# Those of mean groups without a bound and of at most 16 rows in `_LARGE` are the fastest of 16 on an H200, see
# experiments/bench/results/gpu_h200.txt. The others are not timed: they were chosen so that Triton 3.6 compiles them for compute
# capability 8.0, 9.0 and 10.0 (at widths of 2048 and 1408) to tensor core instructions and 16-byte asynchronous copies, without
# spilling registers. That is no safe guide: 128 x 256 with 8 warps spills within its loop and is the fastest by a tenth all the same.
# `python -m experiments.bench kernels --chip=gpu` measures.
_LARGE: Table = {
    ("gmm", 2, 64): Tiles(64, 128, 64, warps=4, stages=4),
    ("gmm", 2, math.inf): Tiles(128, 256, 64, warps=8, stages=4),
    ("tgmm", 2, 16): Tiles(128, 128, 64, warps=4, stages=3),
    ("tgmm", 2, math.inf): Tiles(128, 256, 64, warps=8, stages=3),
}
TILES: dict[str, Table] = {
    "default": {
        ("gmm", 2, 16): Tiles(16, 128, 64, warps=4, stages=4),
        ("gmm", 2, 64): Tiles(64, 128, 64, warps=4, stages=3),
        ("gmm", 2, math.inf): Tiles(128, 128, 32, warps=4, stages=4),
        ("gmm", 4, 16): Tiles(16, 64, 32, warps=4, stages=3),
        ("gmm", 4, math.inf): Tiles(64, 64, 32, warps=8, stages=3),
        ("tgmm", 2, math.inf): Tiles(128, 128, 32, warps=4, stages=4),
        ("tgmm", 4, math.inf): Tiles(64, 64, 32, warps=8, stages=3),
    },
    "a100": {},
    "h100": _LARGE,
    "h200": _LARGE,
    "b200": _LARGE,
}

# For the interpreter, where a tile costs memory and nothing is gained by a larger one: small, so that small arrays have several.
INTERPRET = {"tiles": Tiles(16, 16, 16, warps=1, stages=1, band=2), "interpret": True}


def tiles_for(operation: str, dtype: DTypeLike, m: int, groups: int, table: dict[str, Table] = TILES) -> Tiles:
    """Tiles of an operation on the current chip, for m rows in so many groups."""
    size, mean = jnp.dtype(dtype).itemsize, m / groups
    known = table["default"] | table.get(current_chip().kind, {})
    return known[min(key for key in known if key[:2] == (operation, size) and mean <= key[2])]


def refuses(*arrays: Array) -> str | None:
    """Why the kernels cannot take these arrays, if they cannot."""
    names = sorted({a.dtype.name for a in arrays})
    if len(names) > 1 or names[0] not in ("float32", "bfloat16", "float16"):
        return f"it takes float32, bfloat16 or float16, all the same, not {' and '.join(names)}"
    return None


def gmm(
    x: Float[Array, "m d"],
    w: Float[Array, "e0 _ _"],
    group_sizes: Int[Array, "e"],
    group_offset: Int[Array, ""],
    transpose: bool,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Float[Array, "m _"]:
    """`y[rows of i] = x[rows of i] @ w[i]`, zero elsewhere; with `transpose`, w is [e0, f, d]. See the package."""
    f = w.shape[1 if transpose else 2]
    tiles = tiles or tiles_for("gmm", x.dtype, x.shape[0], group_sizes.shape[0]).within(columns=f, depth=x.shape[1])
    name = "grouped_matmul_transposed" if transpose else "grouped_matmul"
    return gmm_sum([x], [w], group_sizes, group_offset, transpose, tiles, interpret, name)


def gmm_sum(
    xs: Sequence[Float[Array, "m d"]],
    ws: Sequence[Float[Array, "e0 _ _"]],
    group_sizes: Int[Array, "e"],
    group_offset: Int[Array, ""],
    transpose: bool,
    tiles: Tiles,
    interpret: bool = False,
    name: str = "grouped_matmul_sum",
) -> Float[Array, "m _"]:
    """The sum of `gmm(x, w)` over pairs, in one kernel and one float32 accumulator. Shared memory grows with the pairs."""
    (m, d), dtype = xs[0].shape, xs[0].dtype
    f = ws[0].shape[1 if transpose else 2]
    if 0 in (m, d, f):
        return jnp.zeros((m, f), dtype)
    visits = visits_table(group_sizes, group_offset, ws[0].shape[0], m, tiles.rows)
    columns = pl.cdiv(f, tiles.columns)
    operands = [a for pair in zip(xs, ws, strict=True) for a in pair]
    return pl.pallas_call(
        partial(_gmm_kernel, transpose=transpose, tiles=tiles, precision=dot_precision(dtype)),
        out_shape=jax.ShapeDtypeStruct((m, f), dtype),
        grid=(visits.shape[1] * columns,),
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        cost_estimate=pl.CostEstimate(
            flops=2 * m * d * f * len(xs),
            bytes_accessed=sum(a.size * a.dtype.itemsize for a in operands) + m * f * dtype.itemsize,
            transcendentals=0,
        ),
        interpret=interpret,
        name=name,
    )(visits, *operands)


def tgmm(
    x: Float[Array, "m d"],
    dy: Float[Array, "m f"],
    group_sizes: Int[Array, "e"],
    group_offset: Int[Array, ""],
    num_groups: int,
    dtype: DTypeLike = jnp.float32,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Float[Array, "e0 d f"]:
    """`dw[i] = x[rows of i].T @ dy[rows of i]`, summed in float32, zero for empty groups. See the package."""
    (m, d), f = x.shape, dy.shape[1]
    if 0 in (m, d, f, num_groups):
        return jnp.zeros((num_groups, d, f), dtype)
    tiles = tiles or tiles_for("tgmm", x.dtype, m, group_sizes.shape[0]).within(rows=d, columns=f, depth=m)
    return pl.pallas_call(
        partial(_tgmm_kernel, tiles=tiles, precision=dot_precision(x.dtype)),
        out_shape=jax.ShapeDtypeStruct((num_groups, d, f), dtype),
        grid=(num_groups * pl.cdiv(d, tiles.rows) * pl.cdiv(f, tiles.columns),),
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        cost_estimate=pl.CostEstimate(
            flops=2 * m * d * f,
            bytes_accessed=x.size * x.dtype.itemsize
            + dy.size * dy.dtype.itemsize
            + num_groups * d * f * jnp.dtype(dtype).itemsize,
            transcendentals=0,
        ),
        interpret=interpret,
        name="grouped_matmul_weights",
    )(group_bounds(group_sizes, group_offset, num_groups), x, dy)


def group_bounds(group_sizes: Int[Array, "e"], group_offset: Int[Array, ""], num_groups: int) -> Int[Array, "bounds"]:
    """First rows of `num_groups` groups from `group_offset` on, and the end of the last one's rows."""
    ends = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(group_sizes, dtype=jnp.int32)])
    return lax.dynamic_slice(ends, (group_offset,), (num_groups + 1,))


def visits_table(
    group_sizes: Int[Array, "e"], group_offset: Int[Array, ""], num_groups: int, m: int, rows: int
) -> Int[Array, "3 visits"]:
    """Every visit's group, first row and end; group -1 for rows of no computed group, an empty range past the last visit."""
    bounds = group_bounds(group_sizes, group_offset, num_groups)
    # The rows before the groups and after them are two more stretches of rows.
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), bounds])
    ends = jnp.concatenate([bounds, jnp.full(1, m, jnp.int32)])
    visits = (ends - starts + rows - 1) // rows
    last = jnp.cumsum(visits, dtype=jnp.int32)
    visit = jnp.arange(most_visits(m, num_groups, rows), dtype=jnp.int32)
    # Compares all: a binary search is a loop of tiny launches.
    stretch = jnp.minimum((last[None, :] <= visit[:, None]).sum(1, dtype=jnp.int32), num_groups + 1)
    start = starts[stretch] + (visit - (last - visits)[stretch]) * rows
    group = jnp.where(stretch <= num_groups, stretch - 1, -1)
    return jnp.stack([group, start, jnp.minimum(start + rows, ends[stretch])])


def most_visits(m: int, num_groups: int, rows: int) -> int:
    """The visits that any sizes can need: each stretch with rows in it has at most one that is not full."""
    stretches = min(num_groups + 2, m)
    return (m + stretches * (rows - 1)) // rows


def program_order(program: Array, rows: int, columns: int, band: int) -> tuple[Array, Array]:
    """The tile (row, column) of a program: `band` tiles high from left to right, and then the next band.

    Programs that run at the same time then form a block, `band` tiles high and a few wide, whose operands they share.
    """
    row = lax.div(program, band * columns) * band
    height = jnp.minimum(rows - row, band)
    within = lax.rem(program, band * columns)
    return row + lax.rem(within, height), lax.div(within, height)


class Span(NamedTuple):
    """A range of one axis: `size` places from `start` on, of which those before `stop` count; all of them if it is None."""

    start: Array
    size: int
    stop: Array | int | None

    @classmethod
    def of(cls, tile: Array, size: int, axis: int) -> "Span":
        """A tile of an axis; needs no mask where tiles divide the axis."""
        return cls(tile * size, size, axis if axis % size else None)


def spans_mask(*spans: Span) -> Array | None:
    """The places of a tile that count, or None for all of them."""
    mask, shape = None, [span.size for span in spans]
    for axis, span in enumerate(spans):
        if span.stop is not None:
            inside = span.start + lax.broadcasted_iota(jnp.int32, (span.size,), 0) < span.stop
            # Not a reshape: Triton loses track of which neighbours are alike, and then loads them one by one.
            inside = lax.broadcast_in_dim(inside, shape, (axis,))
            mask = inside if mask is None else mask & inside
    return mask


def load_tile(ref: Ref, *spans: Span, group: Array | None = None) -> Array:
    """A tile of `ref`, or of the group's matrix in it, zero where it does not count."""
    mask = spans_mask(*spans)
    at = _at(ref, spans, group)
    return plgpu.load(at) if mask is None else plgpu.load(at, mask=mask, other=0.0)


def store_tile(ref: Ref, value: Array, *spans: Span, group: Array | None = None) -> None:
    """Writes the places of a tile that count."""
    plgpu.store(_at(ref, spans, group), value.astype(ref.dtype), mask=spans_mask(*spans))


def _at(ref: Ref, spans: tuple[Span, ...], group: Array | None) -> Ref:
    slices = tuple(pl.ds(span.start, span.size) for span in spans)
    return ref.at[slices if group is None else (group, *slices)]


def dot_precision(dtype: DTypeLike) -> lax.Precision | None:
    """Exact products of float32, unless `jax.default_matmul_precision` is set: None is what that says."""
    exact = jnp.dtype(dtype) == jnp.float32 and jax.config.jax_default_matmul_precision is None
    return lax.Precision.HIGHEST if exact else None


def dot(a: Array, b: Array, contract: tuple[int, int], precision: lax.Precision | None) -> Array:
    """The product of two tiles in float32, over an axis of each."""
    numbers = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, numbers, precision=precision, preferred_element_type=jnp.float32)


def for_visit(visits_ref: Ref, visit: Array, body: Callable[[Array, Array, Array], None]) -> None:
    """Runs `body(group, first row, end)` for a visit that has rows."""
    group, start, stop = (visits_ref[i, visit] for i in range(3))
    pl.when(start < stop)(lambda: body(group, start, stop))


def _gmm_kernel(visits_ref: Ref, *refs: Ref, transpose: bool, tiles: Tiles, precision: lax.Precision | None) -> None:
    *operands, y_ref = refs
    x_refs, w_refs = operands[::2], operands[1::2]
    d, f = x_refs[0].shape[1], y_ref.shape[1]
    visit, column = program_order(pl.program_id(0), visits_ref.shape[1], pl.cdiv(f, tiles.columns), tiles.band)

    def compute(group: Array, start: Array, stop: Array) -> None:
        rows, columns = Span(start, tiles.rows, stop), Span.of(column, tiles.columns, f)

        def step(k: Array, y: Array) -> Array:
            depth = Span.of(k, tiles.depth, d)
            for x_ref, w_ref in zip(x_refs, w_refs, strict=True):
                x = load_tile(x_ref, rows, depth)
                w = load_tile(w_ref, *((columns, depth) if transpose else (depth, columns)), group=jnp.maximum(group, 0))
                y += dot(x, w, (1, 1 if transpose else 0), precision)
            return y

        # Typed: Triton's lowering would give a plain 0 the type of the condition.
        steps = jnp.where(group < 0, jnp.int32(0), jnp.int32(pl.cdiv(d, tiles.depth)))
        y = lax.fori_loop(0, steps, step, jnp.zeros((tiles.rows, tiles.columns), jnp.float32))
        store_tile(y_ref, y, rows, columns)

    for_visit(visits_ref, visit, compute)


def _tgmm_kernel(
    bounds_ref: Ref, x_ref: Ref, dy_ref: Ref, dw_ref: Ref, *, tiles: Tiles, precision: lax.Precision | None
) -> None:
    _, d, f = dw_ref.shape
    tiles_d, tiles_f = pl.cdiv(d, tiles.rows), pl.cdiv(f, tiles.columns)
    program = pl.program_id(0)
    group = lax.div(program, tiles_d * tiles_f)
    row, column = program_order(lax.rem(program, tiles_d * tiles_f), tiles_d, tiles_f, tiles.band)
    of_d, of_f = Span.of(row, tiles.rows, d), Span.of(column, tiles.columns, f)
    start, stop = bounds_ref[group], bounds_ref[group + 1]

    def step(k: Array, dw: Array) -> Array:
        # Both are masked: a product of zero and what lies past the group, infinity perhaps, would not be zero.
        rows = Span(start + k * tiles.depth, tiles.depth, stop)
        return dw + dot(load_tile(x_ref, rows, of_d), load_tile(dy_ref, rows, of_f), (0, 0), precision)

    steps = lax.div(stop - start + (tiles.depth - 1), tiles.depth)
    dw = lax.fori_loop(0, steps, step, jnp.zeros((tiles.rows, tiles.columns), jnp.float32))
    store_tile(dw_ref, dw, of_d, of_f, group=group)
