"""Grouped matmul on TPU, and the two kernels that everything grouped on TPU is made of.

`rows_by_groups` multiplies rows by their group's matrices; `groups_by_rows` sums outer products of rows into their group's matrix.
Both take several operands and a function that is applied between memory and matmul, which is how the gated unit next door avoids
round trips to HBM.

Grid of `rows_by_groups`: (column tiles, visits, inner tiles), see `visits`. With one inner tile, the usual case, a group's matrix tile
`[d, columns]` stays in VMEM while all row tiles of the group pass, so each matrix is read once, and rows once per column tile.
Grid of `groups_by_rows`: (column tiles, inner tiles, visits); a group's gradient tile stays in VMEM from its first visit to its last.

A row tile is larger than what groups are made of: of a tile, only the windows (`Tiles.window` rows) that hold rows of the visit's
group are multiplied, all of them in one matmul. Large tiles mean few steps and early prefetch; small windows mean few wasted FLOPs.

VMEM, for element size b: twice (double buffering) each tile of each operand and output, `2 b (rows inner R + inner columns W + rows
columns O)` for R row operands, W matrices and O outputs, plus the float32 products. See `tiles`.

Row tiles are masked on the way out (and in, where rows are summed), so that rows past the end, of other groups or never written count
nothing. float32 is multiplied in float32 (`Precision.HIGHEST`, six bfloat16 passes), bfloat16 in one pass; sums are float32.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array

from pallas_kernels.grouped_matmul.tiles import Problem, Tiles, choose, unrolled_limit, vmem_limit
from pallas_kernels.grouped_matmul.visits import Visits, group_visits, row_visits

Interpret = bool | pltpu.InterpretParams
# For the interpreter, where memory that nobody wrote is NaN: small tiles, so that small arrays have several.
INTERPRET = {"tiles": Tiles(rows=16, inner=128, columns=128, window=8), "interpret": pltpu.InterpretParams(detect_races=True)}

# Elements that one piece of elementwise code works on; it is unrolled.
_ELEMENTWISE = 2**17


def gmm(
    x: Array,
    w: Array,
    group_sizes: Array,
    group_offset: Array,
    transpose: bool,
    tiles: Tiles | None = None,
    interpret: Interpret = False,
) -> Array:
    """`y[rows of i] = x[rows of i] @ w[i]`; see the package."""
    (y,) = rows_by_groups(
        (x,), (w,), group_sizes, group_offset, transpose=transpose, name="grouped_matmul", tiles=tiles, interpret=interpret
    )
    return y


def tgmm(
    x: Array,
    dy: Array,
    group_sizes: Array,
    group_offset: Array,
    num_groups: int,
    dtype: DTypeLike = jnp.float32,
    tiles: Tiles | None = None,
    interpret: Interpret = False,
) -> Array:
    """`dw[i] = x[rows of i].T @ dy[rows of i]`, summed in float32; see the package."""
    (dw,) = groups_by_rows(
        x, (dy,), group_sizes, group_offset, num_groups, dtype, name="grouped_matmul_dw", tiles=tiles, interpret=interpret
    )
    return dw


def refuses(*arrays: Array) -> str | None:
    """Why the kernels cannot take these arrays, if they cannot."""
    names = sorted({str(a.dtype) for a in arrays})
    if len(names) > 1 or names[0] not in ("float32", "bfloat16"):
        return f"it takes float32 or bfloat16, all the same, not {' and '.join(names)}"
    return None


def rows_by_groups(
    rows: Sequence[Array],
    matrices: Sequence[Array],
    group_sizes: Array,
    group_offset: Array,
    *,
    name: str,
    transpose: bool = False,
    before: Callable[..., tuple[Array, ...]] | None = None,
    after: Callable[..., tuple[Array, ...]] = lambda *products: products,
    num_outputs: int = 1,
    tiles: Tiles | None = None,
    interpret: Interpret = False,
) -> Sequence[Array]:
    """`after(left_0 @ w_0[i], left_1 @ w_1[i], ...)` on the rows of each group i, where `left_0, ... = before(*rows)`.

    Args:
      rows: arrays `[m, d]` sorted by group.
      matrices: arrays `[e0, d, f]`, or `[e0, f, d]` with `transpose`.
      group_sizes: of all groups.
      group_offset: the group that the matrices begin with.
      name: of the kernel, in compiled programs and profiles.
      before: tiles of `rows` -> one left operand per matrix, in any dtype; by default the one row operand for all. Elementwise in rows.
      after: float32 products -> tiles of the outputs. Elementwise.
      num_outputs: how many outputs `after` gives.
      tiles: by default those of the tuning table or the cost model.
      interpret: runs in the TPU interpreter.

    Returns:
      Arrays `[m, f]` of the rows' dtype; zero outside the groups that the matrices are of.
    """
    m, d = rows[0].shape
    e0, dtype = matrices[0].shape[0], rows[0].dtype
    f = matrices[0].shape[1 if transpose else 2]
    problem = Problem(m, d, f, group_sizes.shape[0], e0, len(rows), len(matrices), num_outputs, dtype.itemsize)
    if 0 in (m, d, f, e0):
        return [jnp.zeros((m, f), dtype)] * num_outputs
    tiles = (tiles or choose("rows_by_groups", problem)).within(d, f)
    column_tiles, inner_tiles = pl.cdiv(f, tiles.columns), pl.cdiv(d, tiles.inner)
    visits = row_visits(group_sizes, group_offset, e0, m, tiles.rows)
    chunk = _chunk(tiles.columns, tiles.window * tiles.inner, unrolled_limit(dtype.itemsize) // len(matrices))
    sums = [pltpu.VMEM((tiles.rows, tiles.columns), jnp.float32)] * (len(matrices) if inner_tiles > 1 else 0)
    operands = [pltpu.VMEM((tiles.window, tiles.inner), dtype)] * (0 if before is None else len(matrices))
    contract = (((1,), (1 if transpose else 0,)), ((), ()))

    def kernel(*refs: Any) -> None:
        refs = _refs(refs, len(rows), len(matrices), num_outputs, len(sums))
        v, k = pl.program_id(1), pl.program_id(2)
        low, high = _rows_in_tile(refs.visits, v, tiles.rows)
        new_tile = (v == 0) | (refs.visits.tile[v] != refs.visits.tile[jnp.maximum(v - 1, 0)])

        @pl.when(new_tile & (k == 0))
        def _() -> None:
            for out in refs.outputs:
                out[...] = jnp.zeros_like(out)

        def multiply(window: pl.Slice) -> None:
            def operands_of(inner: pl.Slice) -> None:
                for ref, operand in zip(refs.operands, before(*(ref[window, inner] for ref in refs.rows)), strict=True):
                    ref[:, inner] = operand.astype(dtype)

            if before is not None:
                _for_chunks(tiles.inner, _chunk(tiles.inner, tiles.window, _ELEMENTWISE), operands_of)

            def columns_of(columns: pl.Slice) -> None:
                left = [ref[...] for ref in refs.operands] or [refs.rows[0][window, :]] * len(matrices)
                right = [ref[0, columns, :] if transpose else ref[0, :, columns] for ref in refs.matrices]
                if d % tiles.inner:
                    # The last inner tile reaches past the end of both operands, where anything may be, NaN included.
                    inner = d - k * tiles.inner
                    left = [_keep(a, 1, 0, inner) for a in left]
                    right = [_keep(a, 1 if transpose else 0, 0, inner) for a in right]
                products = [_dot(a, w, contract) for a, w in zip(left, right, strict=True)]
                if inner_tiles == 1:
                    write(window, columns, products)
                    return
                for sum_, product in zip(refs.sums, products, strict=True):
                    sum_[window, columns] = jnp.where(k == 0, 0, sum_[window, columns]) + product

                @pl.when(k == inner_tiles - 1)
                def _() -> None:
                    write(window, columns, [sum_[window, columns] for sum_ in refs.sums])

            _for_chunks(tiles.columns, chunk, columns_of)

        def write(window: pl.Slice, columns: pl.Slice, products: list[Array]) -> None:
            for out, value in zip(refs.outputs, after(*products), strict=True):
                inside = _between(value.shape, 0, low - window.start, high - window.start)
                kept = out[window, columns].astype(jnp.float32)
                out[window, columns] = jnp.where(inside, value.astype(jnp.float32), kept).astype(out.dtype)

        _for_windows(low, high, tiles.window, multiply)

    row_spec = pl.BlockSpec((tiles.rows, tiles.inner), lambda j, v, k, *s: (Visits(*s, None).source[v], k))
    if transpose:
        matrix = (1, tiles.columns, tiles.inner), lambda j, v, k, *s: (Visits(*s, None).group[v], j, k)
    else:
        matrix = (1, tiles.inner, tiles.columns), lambda j, v, k, *s: (Visits(*s, None).group[v], k, j)
    out_spec = pl.BlockSpec((tiles.rows, tiles.columns), lambda j, v, k, *s: (Visits(*s, None).tile[v], j))
    cost = problem.cost("rows_by_groups", tiles)
    return pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct((m, f), dtype)] * num_outputs,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(column_tiles, visits.count, inner_tiles),
            in_specs=[row_spec] * len(rows) + [pl.BlockSpec(*matrix)] * len(matrices),
            out_specs=[out_spec] * num_outputs,
            scratch_shapes=[*sums, *operands],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=vmem_limit(cost.vmem)
        ),
        cost_estimate=pl.CostEstimate(flops=cost.flops, bytes_accessed=cost.bytes, transcendentals=0),
        interpret=interpret,
        name=name,
    )(*visits[:5], *rows, *matrices)


def groups_by_rows(
    x: Array,
    others: Sequence[Array],
    group_sizes: Array,
    group_offset: Array,
    num_groups: int,
    dtype: DTypeLike,
    *,
    name: str,
    before: Callable[..., tuple[Array, ...]] = lambda *tiles: tiles,
    num_outputs: int = 1,
    tiles: Tiles | None = None,
    interpret: Interpret = False,
) -> Sequence[Array]:
    """`x[rows of i].T @ right[rows of i]` for each `right` of `before(*others)` and each group i.

    Args:
      x: `[m, d]`, rows sorted by group.
      others: arrays `[m, f]`.
      group_sizes: of all groups.
      group_offset: the first of the `num_groups` groups of interest.
      dtype: of the results; sums are float32.
      name: of the kernel.
      before: tiles of `others` -> one right operand per output, in any dtype. Elementwise.
      num_outputs: how many operands `before` gives.
      tiles: by default those of the tuning table or the cost model.
      interpret: runs in the TPU interpreter.

    Returns:
      Arrays `[num_groups, d, f]`; zero for empty groups.
    """
    (m, d), f = x.shape, others[0].shape[1]
    itemsize = jnp.dtype(dtype).itemsize
    problem = Problem(
        m, d, f, group_sizes.shape[0], num_groups, len(others), num_outputs, num_outputs, x.dtype.itemsize, itemsize
    )
    if 0 in (m, d, f, num_groups):
        return [jnp.zeros((num_groups, d, f), dtype)] * num_outputs
    tiles = (tiles or choose("groups_by_rows", problem)).within(d, f)
    chunk = _chunk(tiles.columns, tiles.window * tiles.inner, unrolled_limit(x.dtype.itemsize) // num_outputs)
    visits = group_visits(group_sizes, group_offset, num_groups, m, tiles.rows)

    def kernel(*refs: Any) -> None:
        refs = _refs(refs, 1, len(others), num_outputs, num_outputs)
        (x_ref,), other_refs, v, last = refs.rows, refs.matrices, pl.program_id(2), pl.num_programs(2) - 1
        group = refs.visits.group
        low, high = _rows_in_tile(refs.visits, v, tiles.rows)
        left, *right = refs.operands

        new_group = (v == 0) | (group[v] != group[jnp.maximum(v - 1, 0)])

        def add(window: pl.Slice) -> None:
            # Zeros on both sides: what lies in rows of no group may be infinite.
            bounds = low - window.start, high - window.start
            left[...] = _keep(x_ref[window, :], 0, *bounds).T

            def operands_of(columns: pl.Slice) -> None:
                for ref, operand in zip(right, before(*(ref[window, columns] for ref in other_refs)), strict=True):
                    ref[:, columns] = _keep(operand, 0, *bounds).astype(ref.dtype)

            _for_chunks(tiles.columns, _chunk(tiles.columns, tiles.window, _ELEMENTWISE), operands_of)
            starts = new_group & (window.start <= low)

            def columns_of(columns: pl.Slice) -> None:
                for sum_, operand in zip(refs.sums, right, strict=True):
                    product = _dot(left[...], operand[:, columns], (((1,), (0,)), ((), ())))
                    sum_[:, columns] = jnp.where(starts, 0, sum_[:, columns]) + product

            _for_chunks(tiles.columns, chunk, columns_of)

        _for_windows(low, high, tiles.window, add)

        @pl.when((v == last) | (group[v] != group[jnp.minimum(v + 1, last)]))
        def _() -> None:
            empty = refs.visits.start[v] == refs.visits.end[v]
            for out, sum_ in zip(refs.outputs, refs.sums, strict=True):
                out[0] = jnp.where(empty, 0, sum_[...]).astype(out.dtype)

    out_spec = pl.BlockSpec((1, tiles.inner, tiles.columns), lambda j, i, v, *s: (Visits(*s, None).group[v], i, j))
    cost = problem.cost("groups_by_rows", tiles)
    return pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct((num_groups, d, f), dtype)] * num_outputs,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(pl.cdiv(f, tiles.columns), pl.cdiv(d, tiles.inner), visits.count),
            in_specs=[pl.BlockSpec((tiles.rows, tiles.inner), lambda j, i, v, *s: (Visits(*s, None).source[v], i))]
            + [pl.BlockSpec((tiles.rows, tiles.columns), lambda j, i, v, *s: (Visits(*s, None).source[v], j))] * len(others),
            out_specs=[out_spec] * num_outputs,
            scratch_shapes=[pltpu.VMEM((tiles.inner, tiles.columns), jnp.float32)] * num_outputs
            + [pltpu.VMEM((tiles.inner, tiles.window), x.dtype)]
            + [pltpu.VMEM((tiles.window, tiles.columns), x.dtype)] * num_outputs,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=vmem_limit(cost.vmem)
        ),
        cost_estimate=pl.CostEstimate(flops=cost.flops, bytes_accessed=cost.bytes, transcendentals=0),
        interpret=interpret,
        name=name,
    )(*visits[:5], x, *others)


class _Refs(NamedTuple):
    """What Pallas hands to a kernel, in its order."""

    visits: Visits
    rows: Sequence[Any]
    matrices: Sequence[Any]
    outputs: Sequence[Any]
    sums: Sequence[Any]
    operands: Sequence[Any]


def _refs(refs: Sequence[Any], *counts: int) -> _Refs:
    ends = list(itertools.accumulate((5, *counts)))
    parts = [refs[a:b] for a, b in itertools.pairwise([*ends, len(refs)])]
    return _Refs(Visits(*refs[:5], None), *parts)


def _rows_in_tile(visits: Visits, v: Array, tile_rows: int) -> tuple[Array, Array]:
    """First row of the visit's group, and one past its last, within the tile: 0 <= low <= high <= tile_rows."""
    origin = visits.tile[v] * tile_rows
    return tuple(jnp.clip(rows[v] - origin, 0, tile_rows) for rows in (visits.start, visits.end))


def _for_windows(low: Array, high: Array, size: int, body: Callable[[pl.Slice], None]) -> None:
    """Calls `body` for each window of a tile that holds some of the rows low..high-1."""
    first = jax.lax.div(low, size)
    end = jnp.where(high > low, jax.lax.div(high + size - 1, size), first)

    def step(i: Array, _: None) -> None:
        body(pl.ds(pl.multiple_of(i * size, size), size))

    jax.lax.fori_loop(first, end, step, None)


def _for_chunks(total: int, size: int, body: Callable[[pl.Slice], None]) -> None:
    """Calls `body` for each `size` of `total` columns; a loop, since matmuls are unrolled and code has to be loaded too."""
    if size == total:
        body(pl.ds(0, total))
        return
    jax.lax.fori_loop(0, total // size, lambda i, _: body(pl.ds(pl.multiple_of(i * size, size), size)), None)


def _chunk(total: int, each: int, limit: int) -> int:
    """Columns of a chunk, each of them `each` operations: within `limit` if possible, a multiple of 128, and a divisor of `total`."""
    if total % 128:
        return total
    return max(size for size in range(128, total + 1, 128) if total % size == 0 and (size * each <= limit or size == 128))


def _between(shape: tuple[int, ...], axis: int, low: Array | int, high: Array | int) -> Array:
    index = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
    return (index >= low) & (index < high)


def _keep(a: Array, axis: int, low: Array | int, high: Array | int) -> Array:
    """`a` with zeros outside low..high-1 of an axis."""
    return jnp.where(_between(a.shape, axis, low, high), a, jnp.zeros_like(a))


def _dot(a: Array, b: Array, contract: Any) -> Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(a, b, contract, precision=precision, preferred_element_type=jnp.float32)
