"""The GPU kernels of `pallas_kernels` on the GPU at hand: are they right, what do they cost against their peers, which tiles are best.

Contestants, for each operation and shape: `ours` with the tiles of the table, `ragged_dot` (JAX's own), `torch` (its grouped product,
where PyTorch is installed and sees the GPU), and `dense`, one matrix product of the same FLOPs: the time to aim at. The search times
every tile that fits the chip's memory and registers, in a heat of few repeats, and races the best of them again with all repeats.

A call is timed with several inputs in turn, so that what it reads is not in the cache, and so that launching is not what is timed.
Let JAX leave memory to PyTorch: XLA_PYTHON_CLIENT_PREALLOCATE=false.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments.bench.timing import Timing, race
from pallas_kernels.grouped_matmul import gpu
from pallas_kernels.grouped_matmul.gpu import SHARED, Tiles, shared_bytes
from pallas_kernels.implementations import current_chip

CALLS = 4  # inputs that a timed call goes through


@dataclass(frozen=True)
class Shape:
    """Sizes of a grouped product: m rows of width d in e groups, times matrices [d, f].

    `skewed` gives group i a share of 1 / (i + 1), as an untrained router may; otherwise groups are equal.
    """

    name: str
    m: int
    d: int
    f: int
    e: int
    dtype: str = "bfloat16"
    skewed: bool = False

    @property
    def flops(self) -> int:
        """Of one product, two a multiply-add."""
        return 2 * self.m * self.d * self.f

    def sizes(self) -> np.ndarray:
        """Rows of each group; they sum to m."""
        share = 1 / np.arange(1, self.e + 1) if self.skewed else np.ones(self.e)
        ends = np.round(np.cumsum(share / share.sum()) * self.m).astype(np.int32)
        return np.diff(ends, prepend=0).astype(np.int32)


SHAPES = {
    s.name: s
    for s in (
        Shape("mixtral", m=16384, d=4096, f=14336, e=8),
        Shape("olmoe", m=65536, d=2048, f=1024, e=64),
        Shape("skewed", m=65536, d=2048, f=1024, e=64, skewed=True),
        Shape("fine", m=16384, d=7168, f=2048, e=32),
        Shape("short", m=2048, d=2048, f=1024, e=64),
        Shape("decode", m=512, d=2048, f=1024, e=64),
        Shape("float32", m=8192, d=1024, f=1024, e=16, dtype="float32"),
    )
}


@dataclass(frozen=True)
class Operation:
    """One kernel.

    Attributes:
      name: its key in the tuning table.
      left, right: shapes of the operands; `right` are matrices for `gmm` and rows for `tgmm`.
      ours: tiles (None: those of the table) -> function of left, right and sizes.
      ragged_dot, torch, dense: the same by others.
      exact: the same in NumPy.
    """

    name: str
    left: Callable[[Shape], tuple[int, ...]]
    right: Callable[[Shape], tuple[int, ...]]
    ours: Callable[..., Callable[..., Array]]
    ragged_dot: Callable[..., Array]
    dense: Callable[..., Array]
    torch: Callable[..., Any]
    exact: Callable[..., np.ndarray]


@dataclass
class Result:
    """What was found out about an operation at a shape.

    Attributes:
      operation, shape, chip: what was timed, where.
      error: largest difference from NumPy, over the largest value.
      timings: seconds of one call, by contestant.
      failed: why a contestant has no timing.
      tiles: seconds of one call with each of the best tiles.
    """

    operation: str
    shape: Shape
    chip: str
    error: float
    timings: dict[str, Timing] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    tiles: dict[Tiles, Timing] = field(default_factory=dict)


def run(
    shapes: Iterable[Shape] = tuple(SHAPES.values()),
    repeats: int = 9,
    against: tuple[str, ...] = ("ragged_dot", "torch"),
    search: bool = True,
    candidates: Callable[[str, str, str], list[Tiles]] | None = None,
    interpret: bool = False,
) -> list[Result]:
    """Checks, times and tunes every operation at every shape.

    Args:
      shapes: see `SHAPES`.
      repeats: of each timing.
      against: peers besides the dense product.
      search: whether to look for better tiles.
      candidates: (operation, dtype, chip) -> tiles to try; by default `candidate_tiles`.
      interpret: runs our kernels in Pallas' interpreter, on any platform: to test this file.

    Raises:
      RuntimeError: a kernel's result is wrong; nothing is timed then.
    """
    options = {"interpret": interpret}
    results = []
    for shape, operation in itertools.product(shapes, OPERATIONS):
        result = Result(operation.name, shape, current_chip().kind, _check(operation, shape, options))
        arguments = _inputs(operation, shape), jnp.asarray(shape.sizes())
        functions = {"dense": operation.dense, "ours": operation.ours(None, **options)}
        functions |= {"ragged_dot": operation.ragged_dot} if "ragged_dot" in against else {}
        able = {n: f for n, f in functions.items() if _try(n, partial(_race, {n: f}, *arguments, 3), result.failed)}
        result.timings = _race(able, *arguments, repeats)
        if "torch" in against:
            result.timings |= _try("torch", partial(_time_torch, operation, shape, repeats), result.failed)
        if search:
            tiles = (candidates or candidate_tiles)(operation.name, shape.dtype, result.chip)
            result.tiles = _search(operation, tiles, arguments, repeats, options)
        results.append(result)
    return results


def candidate_tiles(operation: str, dtype: str, chip: str) -> list[Tiles]:
    """Tiles that fit the chip: shared memory for the operands, half of the registers for the sums."""
    size, shared = jnp.dtype(dtype).itemsize, SHARED.get(chip, SHARED["default"])
    row_sizes = (64, 128, 256) if operation == "tgmm" else (16, 32, 64, 128, 256)
    found = []
    for rows, columns, depth, warps, stages in itertools.product(
        row_sizes, (64, 128, 256), (32, 64, 128), (4, 8), (2, 3, 4, 5)
    ):
        tiles = Tiles(rows, columns, depth, warps, stages)
        sums = rows * columns // (32 * warps)  # registers of a thread
        if 8 <= sums <= 128 and shared // 4 <= shared_bytes(tiles, size) <= shared:
            found.append(tiles)
    return found


def _check(operation: Operation, shape: Shape, options: Mapping[str, Any]) -> float:
    """The error at a small shape of the same kind, with groups that end anywhere and rows of no group."""
    small = Shape(shape.name, m=min(shape.m, 777), d=min(shape.d, 320), f=min(shape.f, 200), e=shape.e, dtype=shape.dtype)
    rng = np.random.default_rng(0)
    sizes = rng.multinomial(small.m - small.m // 10, rng.dirichlet(np.ones(small.e))).astype(np.int32)
    left, right = (_values(rng, side(small), small.dtype) for side in (operation.left, operation.right))
    got = np.asarray(jax.jit(operation.ours(None, **options))(left, right, jnp.asarray(sizes)), np.float64)
    exact = operation.exact(np.asarray(left, np.float64), np.asarray(right, np.float64), sizes)
    error = float(np.abs(got - exact).max() / np.abs(exact).max())
    limit = 1e-5 if shape.dtype == "float32" or operation.name == "tgmm" else 1e-2
    if not error <= limit:
        raise RuntimeError(
            f"{operation.name} is wrong by {error:.1e} of its largest value in {shape.dtype}; at most {limit} is rounding"
        )
    return error


def _values(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Array:
    return jnp.asarray(rng.normal(size=shape).astype(np.float32), dtype)


def _inputs(operation: Operation, shape: Shape) -> list[tuple[Array, Array]]:
    """Different rows each time; `gmm`'s matrices are large, and are the same."""
    keys = jax.random.split(jax.random.key(0), CALLS + 1)
    draw = partial(jax.random.normal, dtype=shape.dtype)
    right = draw(keys[-1], operation.right(shape))
    return [(draw(key, operation.left(shape)), right) for key in keys[:CALLS]]


def _race(
    functions: Mapping[Any, Callable[..., Array]], pairs: list[tuple[Array, Array]], sizes: Array, repeats: int
) -> dict[Any, Timing]:
    def every(function: Callable[..., Array]) -> Callable[..., list[Array]]:
        return lambda pairs, sizes: [function(left, right, sizes) for left, right in pairs]

    raced = race({name: (every(function), (pairs, sizes)) for name, function in functions.items()}, repeats)
    return {name: _of_one_call(timing) for name, timing in raced.items()}


def _of_one_call(t: Timing) -> Timing:
    return Timing(t.median / CALLS, t.low / CALLS, t.high / CALLS, t.compile_seconds, t.temp_bytes)


def _try(name: Any, timed: Callable[[], dict[Any, Timing]], failed: dict[Any, str]) -> dict[Any, Timing]:
    """What `timed` gives, or nothing and why not: peers lack operations and memory, and not all tiles compile."""
    try:
        return timed()
    except Exception as error:
        failed[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:120]}"
        return {}


def _search(
    operation: Operation,
    tiles: list[Tiles],
    arguments: tuple[list[tuple[Array, Array]], Array],
    repeats: int,
    options: Mapping[str, Any],
    finalists: int = 4,
) -> dict[Tiles, Timing]:
    """The fastest tiles with their timings, best first."""
    heats: dict[Tiles, Timing] = {}
    for t in tiles:
        heats |= _try(t, partial(_race, {t: operation.ours(t, **options)}, *arguments, 3), {})
    best = sorted(heats, key=lambda t: heats[t].median)[:finalists]
    final = _race({t: operation.ours(t, **options) for t in best}, *arguments, repeats)
    return dict(sorted(final.items(), key=lambda item: item[1].median))


def table(results: list[Result]) -> str:
    """Lines for people: seconds, FLOP rate and ratio to the dense product of each contestant, and the best tiles."""
    lines = []
    for r in results:
        s = r.shape
        kind = "skewed" if s.skewed else "equal"
        lines.append(
            f"\n{r.operation} {s.name} on {r.chip}: m={s.m} d={s.d} f={s.f} e={s.e} {kind} {s.dtype}, error {r.error:.0e}"
        )
        lines.append(f"{'contestant':<44}{'ms':>9}{'quartiles':>18}{'TFLOP/s':>9}{'ratio':>7}")
        rows = r.timings | {_name(t): timing for t, timing in r.tiles.items()}
        for name, t in rows.items():
            ratio = f"{t.median / r.timings['dense'].median:.2f}" if "dense" in r.timings else "-"
            spread = f"{t.low * 1e3:.3f}-{t.high * 1e3:.3f}"
            lines.append(f"{name:<44}{t.median * 1e3:>9.3f}{spread:>18}{s.flops / t.median / 1e12:>9.1f}{ratio:>7}")
        lines += [f"{name:<44}{why}" for name, why in r.failed.items()]
    return "\n".join(lines + ["ratio: time over that of one dense product of equal FLOPs, in the same run"])


def entries(results: list[Result]) -> str:
    """Lines to paste into the chip's part of `TILES`: for each bucket of shapes, the tiles with the least time against dense.

    Where several shapes fall into a bucket, the tiles that are best for the worst of them win, among those timed for all.
    """
    buckets: dict[tuple[str, int, float], list[Result]] = {}
    for r in results:
        if r.tiles:
            buckets.setdefault(_bucket(r), []).append(r)
    lines = []
    for key, members in sorted(buckets.items()):
        common = set.intersection(*(set(r.tiles) for r in members)) or {next(iter(members[0].tiles))}

        def worst(t: Tiles, members: list[Result] = members) -> float:
            best = [next(iter(r.tiles.values())).median for r in members]
            return max(r.tiles[t].median / b if t in r.tiles else 1.0 for r, b in zip(members, best, strict=True))

        bound = "math.inf" if key[2] == float("inf") else str(key[2])
        shapes = ", ".join(r.shape.name for r in members)
        lines.append(f'    ("{key[0]}", {key[1]}, {bound}): {_name(min(common, key=worst))},  # measured: {shapes}')
    chip = results[0].chip if results else ""
    return "\n".join([f'"{chip}": {{', *lines, "},"])


def _bucket(r: Result) -> tuple[str, int, float]:
    size, mean = jnp.dtype(r.shape.dtype).itemsize, r.shape.m / r.shape.e
    known = gpu.TILES["default"] | gpu.TILES.get(r.chip, {})
    return min(key for key in known if key[:2] == (r.operation, size) and mean <= key[2])


def _name(t: Tiles) -> str:
    return f"Tiles({t.rows}, {t.columns}, {t.depth}, warps={t.warps}, stages={t.stages}, band={t.band})"


def _time_torch(operation: Operation, shape: Shape, repeats: int) -> dict[str, Timing]:
    """Seconds of one call in PyTorch, with the GPU's own clock."""
    import torch

    start = time.perf_counter()
    draw = partial(torch.randn, device="cuda", dtype=getattr(torch, shape.dtype))
    lefts, right = [draw(operation.left(shape)) for _ in range(CALLS)], draw(operation.right(shape))
    sizes = shape.sizes()
    ends = torch.tensor(np.cumsum(sizes), dtype=torch.int32, device="cuda")
    for left in lefts:
        operation.torch(torch, left, right, sizes, ends)
    torch.cuda.synchronize()
    warm = time.perf_counter() - start
    seconds = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for left in lefts:
            operation.torch(torch, left, right, sizes, ends)
        end.record()
        torch.cuda.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3 / CALLS)
    low, median, high = statistics.quantiles(seconds, n=4)
    return {"torch": Timing(median, low, high, warm, 0)}


def _torch_gmm(torch: Any, x: Any, w: Any, sizes: np.ndarray, ends: Any) -> Any:
    if x.dtype == torch.bfloat16 and hasattr(torch, "_grouped_mm"):
        return torch._grouped_mm(x, w, offs=ends)
    return torch.cat([rows @ w[i] for i, rows in enumerate(torch.split(x, sizes.tolist()))])


def _torch_tgmm(torch: Any, x: Any, dy: Any, sizes: np.ndarray, ends: Any) -> Any:
    if x.dtype == torch.bfloat16 and hasattr(torch, "_grouped_mm"):
        return torch._grouped_mm(x.T, dy, offs=ends)
    pairs = zip(torch.split(x, sizes.tolist()), torch.split(dy, sizes.tolist()), strict=True)
    return torch.stack([rows.T @ grads for rows, grads in pairs])


def _zero() -> Array:
    return jnp.int32(0)


def _ours_gmm(tiles: Tiles | None, **options: Any) -> Callable[..., Array]:
    return lambda x, w, sizes: gpu.gmm(x, w, sizes, _zero(), False, tiles=tiles, **options)


def _ours_tgmm(tiles: Tiles | None, **options: Any) -> Callable[..., Array]:
    return lambda x, dy, sizes: gpu.tgmm(x, dy, sizes, _zero(), sizes.shape[0], tiles=tiles, **options)


def _ragged_tgmm(x: Array, dy: Array, sizes: Array) -> Array:
    numbers = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
    return jax.lax.ragged_dot_general(x, dy, sizes, numbers, preferred_element_type=jnp.float32)


def _exact_gmm(x: np.ndarray, w: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    parts = np.split(x, np.cumsum(sizes))
    return np.concatenate([*(rows @ w[i] for i, rows in enumerate(parts[:-1])), np.zeros((len(parts[-1]), w.shape[2]))])


def _exact_tgmm(x: np.ndarray, dy: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    parts = zip(np.split(x, np.cumsum(sizes))[:-1], np.split(dy, np.cumsum(sizes))[:-1], strict=True)
    return np.stack([rows.T @ grads for rows, grads in parts])


OPERATIONS = (
    Operation(
        name="gmm",
        left=lambda s: (s.m, s.d),
        right=lambda s: (s.e, s.d, s.f),
        ours=_ours_gmm,
        ragged_dot=jax.lax.ragged_dot,
        dense=lambda x, w, sizes: x @ w[0],
        torch=_torch_gmm,
        exact=_exact_gmm,
    ),
    Operation(
        name="tgmm",
        left=lambda s: (s.m, s.d),
        right=lambda s: (s.m, s.f),
        ours=_ours_tgmm,
        ragged_dot=_ragged_tgmm,
        dense=lambda x, dy, sizes: jax.lax.dot_general(x, dy, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32),
        torch=_torch_tgmm,
        exact=_exact_tgmm,
    ),
)
