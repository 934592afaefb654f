"""Tile sizes of the TPU kernels: from a table of measured choices, or else from a model of what a choice costs.

The model counts, for every candidate that fits into VMEM, the FLOPs (those wasted on ragged ends included), the bytes that cross HBM
and the grid's steps, and takes the least `max(FLOPs / peak, bytes / bandwidth) + steps * overhead`.
"""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pallas_kernels.chips import MIB, TPUS, Tpu
from pallas_kernels.implementations import current_chip

Kernel = Literal["rows_by_groups", "groups_by_rows"]


class Tiles(NamedTuple):
    """Tile sizes of one kernel.

    Attributes:
      rows: of a row tile.
      inner: of d: what `rows_by_groups` contracts, and one side of `groups_by_rows`' results.
      columns: of f.
      window: rows of a tile are computed in multiples of this many; divides `rows`.
    """

    rows: int
    inner: int
    columns: int
    window: int

    def within(self, d: int, f: int) -> "Tiles":
        """No larger than the arrays."""
        return self._replace(inner=min(self.inner, d), columns=min(self.columns, f))


class Cost(NamedTuple):
    """What a call costs.

    Attributes:
      flops: useful ones.
      computed_flops: with those on rows of other groups and on padding.
      bytes: that cross HBM.
      vmem: bytes in use on one core.
      steps: of the grid.
    """

    flops: int
    computed_flops: int
    bytes: int
    vmem: int
    steps: int


@dataclass(frozen=True)
class Problem:
    """Sizes of a call, as far as they are static.

    Attributes:
      m, d, f: rows, inner width, columns.
      groups: e, all groups.
      held: e0, the groups of the matrices.
      operands: row operands `[m, d]` of `rows_by_groups`, or `[m, f]` of `groups_by_rows` (which has one `[m, d]` besides).
      matrices: `[held, d, f]`, read by the one kernel and written by the other.
      outputs: `[m, f]` that `rows_by_groups` writes.
      itemsize: bytes of an element.
      result_itemsize: of an element of `groups_by_rows`' results.
    """

    m: int
    d: int
    f: int
    groups: int
    held: int
    operands: int = 1
    matrices: int = 1
    outputs: int = 1
    itemsize: int = 2
    result_itemsize: int = 2

    def cost(self, kernel: Kernel, tiles: Tiles) -> Cost:
        """Counts for groups of equal size, none of which ends where a tile does."""
        return {"rows_by_groups": self._rows_by_groups, "groups_by_rows": self._groups_by_rows}[kernel](tiles)

    def _rows_by_groups(self, t: Tiles) -> Cost:
        b, w = self.itemsize, self.matrices
        row_tiles, column_tiles, inner_tiles = _ceil(self.m, t.rows), _ceil(self.f, t.columns), _ceil(self.d, t.inner)
        visits = row_tiles + self.held - 1
        # With one inner tile, blocks that the next visit shares are kept; otherwise each visit walks through its own.
        rows_read = row_tiles * t.rows if inner_tiles == 1 else visits * t.rows
        matrices_read = self.held if inner_tiles == 1 else visits
        traffic = (
            self.operands * rows_read * self.d * column_tiles
            + w * matrices_read * self.d * self.f
            + self.outputs * self.m * self.f
        ) * b
        inner, columns = _pad(t.inner), _pad(t.columns)
        vmem = 2 * b * (self.operands * t.rows * inner + w * inner * columns + self.outputs * t.rows * columns)
        vmem += 4 * w * columns * (t.window + (t.rows if inner_tiles > 1 else 0))  # float32 products and their sums
        if self.operands > 1:
            vmem += t.window * inner * (w * b + 4 * (self.operands + w))  # the left operands, computed in float32
        return Cost(*self._flops(t, column_tiles, inner_tiles), traffic, vmem, column_tiles * visits * inner_tiles)

    def _groups_by_rows(self, t: Tiles) -> Cost:
        b, w = self.itemsize, self.matrices
        row_tiles, column_tiles, inner_tiles = _ceil(self.m, t.rows), _ceil(self.f, t.columns), _ceil(self.d, t.inner)
        visits = row_tiles + self.held - 1
        share = self.held / self.groups
        traffic = int(share * self.m * (self.d * column_tiles + self.operands * self.f * inner_tiles)) * b
        traffic += w * self.held * self.d * self.f * self.result_itemsize
        inner, columns = _pad(t.inner), _pad(t.columns)
        vmem = 2 * b * t.rows * (inner + self.operands * columns) + 2 * self.result_itemsize * w * inner * columns
        vmem += 4 * inner * columns * w + t.window * (inner + w * columns) * b  # float32 sums, masked operands
        vmem += 4 * t.window * (inner + columns * (self.operands + w))  # what they are computed from, in float32
        return Cost(*self._flops(t, column_tiles, inner_tiles), traffic, vmem, column_tiles * visits * inner_tiles)

    def _flops(self, t: Tiles, column_tiles: int, inner_tiles: int) -> tuple[int, int]:
        rows = -(-self.m * self.held // self.groups)
        useful = 2 * rows * self.d * self.f * self.matrices
        # A group begins and ends inside a window: half a window is wasted at each end.
        computed = 2 * (rows + self.held * t.window) * column_tiles * t.columns * inner_tiles * t.inner * self.matrices
        return useful, computed


# (chip, kernel, m, d, f, e, e0), m rounded up to a power of two -> tiles that measurements on that chip favour over the model's.
# Empty: the kernels have been compiled for every chip here, but not yet timed on one.
TILES: dict[tuple[str, str, int, int, int, int, int], Tiles] = {}

# Seconds that a step of a kernel's grid takes beyond its arithmetic and its transfers.
STEP_SECONDS = 0.35e-6
# Multiply-adds of a step's matmuls, which are unrolled: enough to hide their ends, not so many that compiling takes long.
_UNROLLED = 2**28
# Of VMEM: what kernels may use, and what the tiles that the model counts may use of that.
_LIMIT, _FILL = 0.8, 0.8


def chip() -> Tpu:
    """Figures of the chip that kernels are traced for; v5e's where it is no TPU (the interpreter) or an unknown one."""
    return TPUS.get(current_chip().kind, TPUS["v5e"])


def usable_vmem() -> int:
    """Bytes of VMEM that a kernel may use at most."""
    return int(chip().vmem * _LIMIT)


def vmem_limit(counted: int) -> int:
    """Bytes of VMEM to reserve for a kernel that counts so many: with room for error, so that XLA can use the rest."""
    return min(usable_vmem(), counted * 3 // 2 + 8 * MIB)


def unrolled_limit(itemsize: int) -> int:
    """Multiply-adds that a step may unroll; one of float32 is six of bfloat16."""
    return _UNROLLED // (6 if itemsize == 4 else 1)


def choose(kernel: Kernel, problem: Problem) -> Tiles:
    """The table's tiles, or the model's."""
    m = 1 << (problem.m - 1).bit_length()
    key = (current_chip().kind, kernel, m, problem.d, problem.f, problem.groups, problem.held)
    return TILES.get(key) or _model(kernel, problem, chip())


def efficiency(kernel: Kernel, window: int, mxu: int) -> float:
    """Share of the peak that matmuls of `window` rows reach on a matrix unit that is `mxu` wide.

    Fitted to the instruction bundles that the compiler schedules for our inner loops, window by window and chip by chip.
    """
    if kernel == "groups_by_rows":  # rows are contracted: a window shorter than the unit is deep leaves the rest of it idle
        return min(1.0, window / mxu)
    return window / (window + mxu // 8)


def seconds(kernel: Kernel, problem: Problem, tiles: Tiles, on: Tpu) -> float:
    """The model's estimate: not a measurement."""
    cost = problem.cost(kernel, tiles)
    parts = _ceil(problem.f, tiles.columns)
    busy = parts / (on.cores * _ceil(parts, on.cores))  # cores share the column tiles
    peak = on.flops / (6 if problem.itemsize == 4 else 1) * efficiency(kernel, tiles.window, on.mxu)
    return max(cost.computed_flops / (peak * busy), cost.bytes / on.bandwidth) + cost.steps * STEP_SECONDS / on.cores


@functools.cache
def _model(kernel: Kernel, problem: Problem, on: Tpu) -> Tiles:
    # Among equals, the one that needs least VMEM.
    return min(_candidates(kernel, problem, on))[-1]


def _candidates(kernel: Kernel, problem: Problem, on: Tpu) -> Iterator[tuple[float, int, Tiles]]:
    """Those that fit, with their seconds and VMEM."""
    sizes = itertools.product(_row_sizes(problem.m), _sizes(problem.d), _sizes(problem.f), (64, 128, 256))
    for tiles in {Tiles(rows, inner, columns, min(rows, window)) for rows, inner, columns, window in sizes}:
        unrolled = tiles.window * tiles.inner * min(128, tiles.columns) * problem.matrices
        vmem = problem.cost(kernel, tiles).vmem
        if vmem <= on.vmem * _LIMIT * _FILL and unrolled <= unrolled_limit(problem.itemsize):
            yield seconds(kernel, problem, tiles, on), vmem, tiles


def _row_sizes(m: int) -> list[int]:
    """16 rows are the least that bfloat16 is laid out in."""
    if m <= 128:
        return [_pad(m, 16)]
    return [rows for rows in (128, 256, 512) if rows < 2 * m]


def _sizes(n: int) -> list[int]:
    """All of n, whatever it is, if it is not too long for one piece of code; or its parts, in multiples of the 128 lanes."""
    parts = {_pad(_ceil(n, k)) for k in (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 32, 64, 128)}
    return sorted(size for size in parts if size < n) + ([n] if n % 128 == 0 or n <= 2048 else [])


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _pad(n: int, to: int = 128) -> int:
    return _ceil(n, to) * to
