"""The GPU kernels of `pallas_kernels` on the GPU at hand: are they right, what do they cost against their peers, which tiles are best.

Contestants, for each operation and shape: `dense`, one matrix product of the same FLOPs, the time to aim at; `ours` with the tiles
of the table; `ragged_dot`, JAX's own; `tokamax` and `torch`, their grouped products, where they are installed. The search times
every tile that fits the chip's memory and registers, in a heat of few repeats, and races the best of them again with all repeats.

A call is timed with several inputs in turn, so that what it reads is not in the cache, and so that launching is not what is timed.
Let JAX leave memory to PyTorch: XLA_PYTHON_CLIENT_PREALLOCATE=false.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments.bench.gpu_contestants import OPERATIONS, SHAPES, Operation, Shape, bound_text, tokamax_general
from experiments.bench.timing import Foreign, Timing, race
from pallas_kernels.grouped_matmul.gpu import SHARED, Tiles, shared_bytes
from pallas_kernels.implementations import current_chip

PEERS = ("ragged_dot", "tokamax", "torch")
CALLS = 4  # inputs that a timed call goes through

Contestants = dict[Any, Callable[..., Array] | Foreign]


@dataclass
class Result:
    """What was found out about an operation at a shape.

    Attributes:
      operation, shape, chip: what was timed, where.
      error: largest difference from NumPy, over the largest value.
      timings: seconds of one call, by contestant.
      failed: why a contestant has no timing.
      tiles: seconds of one call with the best tiles, best first.
    """

    operation: Operation
    shape: Shape
    chip: str
    error: float
    timings: dict[str, Timing] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    tiles: dict[Tiles, Timing] = field(default_factory=dict)


def run(
    shapes: Iterable[Shape] = tuple(SHAPES.values()),
    repeats: int = 9,
    against: Sequence[str] = PEERS,
    search: bool = True,
    candidates: Callable[[Operation, str, str], list[Tiles]] | None = None,
    interpret: bool = False,
) -> list[Result]:
    """Checks, times and tunes every operation at every shape; `table` and `entries` print the results.

    Args:
      shapes: see `SHAPES`.
      repeats: of each timing.
      against: peers besides the dense product.
      search: whether to look for better tiles.
      candidates: (operation, dtype, chip) -> tiles to try; by default `candidate_tiles`.
      interpret: runs our kernels in Pallas' interpreter, on any platform: to test this file.

    Raises:
      RuntimeError: a kernel's result is wrong; it is not timed then.
    """
    chip, results = current_chip().kind, []
    for shape, operation in itertools.product(shapes, OPERATIONS):
        result = Result(operation, shape, chip, check(operation, shape, interpret))
        arguments = inputs(operation, shape), jnp.asarray(shape.sizes())
        contestants: Contestants = {"dense": operation.dense, "ours": operation.ours(None, interpret)}
        if "ragged_dot" in against:
            contestants["ragged_dot"] = partial(operation.ragged, jax.lax.ragged_dot_general)
        if "tokamax" in against:
            contestants |= attempt("tokamax", partial(tokamax_contestant, operation), result.failed)
        if "torch" in against:
            contestants |= attempt("torch", partial(torch_contestant, operation, shape), result.failed)
        able = {n: c for n, c in contestants.items() if attempt(n, partial(timed, {n: c}, *arguments, 3), result.failed)}
        result.timings = timed(able, *arguments, repeats)
        if search:
            tiles = (candidates or candidate_tiles)(operation, shape.dtype, chip)
            result.tiles = fastest(operation, tiles, arguments, repeats, interpret)
        results.append(result)
    return results


def check(operation: Operation, shape: Shape, interpret: bool) -> float:
    """The error at a small shape of the same kind, with groups that end anywhere and rows of no group."""
    small = replace(shape, m=min(shape.m, 777), d=min(shape.d, 320), f=min(shape.f, 200))
    rng = np.random.default_rng(0)
    sizes = rng.multinomial(small.m - small.m // 10, rng.dirichlet(np.ones(small.e))).astype(np.int32)
    operands = [jnp.asarray(rng.normal(size=s) / s[-1] ** 0.5, shape.dtype) for s in operation.sides(small)]
    got = np.asarray(jax.jit(operation.ours(None, interpret))(*operands, jnp.asarray(sizes)), np.float64)
    exact = operation.exact(*(np.asarray(a, np.float64) for a in operands), sizes)
    error = float(np.abs(got - exact).max() / np.abs(exact).max())
    limit = 1e-5 if shape.dtype == "float32" else 1e-2
    if not error <= limit:
        raise RuntimeError(
            f"{operation.name} is wrong by {error:.1e} of its largest value in {shape.dtype}; rounding gives at most {limit}"
        )
    return error


def candidate_tiles(operation: Operation, dtype: str, chip: str) -> list[Tiles]:
    """Tiles that fit the chip: operands in its shared memory, the sums in half of its registers."""
    size, shared = jnp.dtype(dtype).itemsize, SHARED.get(chip, SHARED["default"])
    row_sizes = (64, 128, 256) if operation.name == "tgmm" else (16, 32, 64, 128, 256)
    found = []
    for rows, columns, depth, warps, stages in itertools.product(
        row_sizes, (64, 128, 256), (32, 64, 128), (4, 8), (2, 3, 4, 5)
    ):
        tiles = Tiles(rows, columns, depth, warps, stages)
        sums = operation.sums * rows * columns // (32 * warps)  # registers of a thread
        if 8 <= sums <= 128 and shared // 4 <= shared_bytes(tiles, size, *operation.tiles_read) <= shared:
            found.append(tiles)
    return found


def fastest(
    operation: Operation,
    tiles: Iterable[Tiles],
    arguments: tuple[list[list[Array]], Array],
    repeats: int,
    interpret: bool,
    finalists: int = 4,
) -> dict[Tiles, Timing]:
    """The fastest tiles with their timings, best first; those that do not compile are left out."""
    heats: dict[Tiles, Timing] = {}
    for t in tiles:
        heats |= attempt(t, partial(timed, {t: operation.ours(t, interpret)}, *arguments, 3), {})
    best = sorted(heats, key=lambda t: heats[t].median)[:finalists]
    final = timed({t: operation.ours(t, interpret) for t in best}, *arguments, repeats)
    return dict(sorted(final.items(), key=lambda item: item[1].median))


def attempt(name: Any, what: Callable[[], dict[Any, Any]], failed: dict[Any, str]) -> dict[Any, Any]:
    """What `what` gives, or nothing and the reason: peers lack operations and memory, and not all tiles compile."""
    try:
        return what()
    except Exception as error:
        failed[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:120]}"
        return {}


def inputs(operation: Operation, shape: Shape) -> list[list[Array]]:
    """Operands of each call: different rows each time; matrices are large, and are the same."""
    sides = operation.sides(shape)
    keys = jax.random.split(jax.random.key(0), (CALLS, len(sides)))
    draw = partial(jax.random.normal, dtype=shape.dtype)
    matrices = [draw(k, s) for k, s in zip(keys[0, operation.rows :], sides[operation.rows :], strict=True)]
    return [[draw(k, s) for k, s in zip(row, sides[: operation.rows], strict=False)] + matrices for row in keys]


def timed(contestants: Contestants, operands: list[list[Array]], sizes: Array, repeats: int) -> dict[Any, Timing]:
    """Seconds of one call of each."""

    def every(function: Callable[..., Array]) -> tuple[Callable[..., list[Array]], tuple[Any, ...]]:
        return lambda operands, sizes: [function(*call, sizes) for call in operands], (operands, sizes)

    raced = race({n: c if isinstance(c, Foreign) else every(c) for n, c in contestants.items()}, repeats)
    return {n: replace(t, median=t.median / CALLS, low=t.low / CALLS, high=t.high / CALLS) for n, t in raced.items()}


def tokamax_contestant(operation: Operation) -> Contestants:
    return {"tokamax": partial(operation.ragged, tokamax_general())}


def torch_contestant(operation: Operation, shape: Shape) -> dict[str, Foreign]:
    """The same calls in PyTorch, with its own inputs."""
    import torch

    sides = operation.sides(shape)
    draw = partial(torch.randn, device="cuda", dtype=getattr(torch, shape.dtype))
    matrices = [draw(s) for s in sides[operation.rows :]]
    calls = [[draw(s) for s in sides[: operation.rows]] + matrices for _ in range(CALLS)]
    sizes = shape.sizes()
    ends = torch.tensor(np.cumsum(sizes), dtype=torch.int32, device="cuda")

    def call() -> None:
        for operands in calls:
            operation.torch(torch, *operands, sizes, ends)
        torch.cuda.synchronize()

    return {"torch": Foreign(call)}


def table(results: Iterable[Result]) -> str:
    """Lines for people: time, FLOP rate and ratio to the dense product of each contestant, and of the best tiles."""
    lines = []
    for r in results:
        s = r.shape
        sizes = "skewed" if s.skewed else "equal"
        title = (
            f"{r.operation.name} {s.name} on {r.chip}: m={s.m} d={s.d} f={s.f} e={s.e} {sizes} {s.dtype}, error {r.error:.0e}"
        )
        lines += ["", title, f"{'contestant':<44}{'ms':>9}{'quartiles':>18}{'TFLOP/s':>9}{'ratio':>7}"]
        for name, t in (r.timings | {_text(t): timing for t, timing in r.tiles.items()}).items():
            ratio = f"{t.median / r.timings['dense'].median:.2f}" if "dense" in r.timings else "-"
            rate = r.operation.flops(s) / t.median / 1e12
            lines.append(f"{name:<44}{t.median * 1e3:>9.3f}{f'{t.low * 1e3:.3f}-{t.high * 1e3:.3f}':>18}{rate:>9.1f}{ratio:>7}")
        lines += [f"{name:<44}{why}" for name, why in r.failed.items()]
    return "\n".join([*lines, "ratio: time over that of one dense product of equal FLOPs, in the same run"])


def entries(results: Iterable[Result]) -> str:
    """Lines to paste into the chip's part of the tuning tables: for each bucket of shapes, its best tiles.

    Where several shapes fall into a bucket, those win that cost the worst-served shape least, among tiles that were finalists for
    all of them (or for the first, if there are none).
    """
    buckets: dict[tuple[str, int, int | float], list[Result]] = {}
    for r in results:
        if r.tiles:
            buckets.setdefault(r.operation.bucket(r.shape, r.chip), []).append(r)

    def loss(t: Tiles, members: list[Result]) -> float:
        return max(r.tiles[t].median / min(timing.median for timing in r.tiles.values()) for r in members if t in r.tiles)

    lines = []
    for (name, size, bound), members in sorted(buckets.items()):
        common = [t for t in members[0].tiles if all(t in r.tiles for r in members)] or list(members[0].tiles)
        best = min(common, key=partial(loss, members=members))
        shapes = ", ".join(r.shape.name for r in members)
        lines.append(f'    ("{name}", {size}, {bound_text(bound)}): {_text(best)},  # measured: {shapes}')
    return "\n".join(lines)


def _text(t: Tiles) -> str:
    return f"Tiles({t.rows}, {t.columns}, {t.depth}, warps={t.warps}, stages={t.stages}, band={t.band})"
