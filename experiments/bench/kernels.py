"""The TPU kernels of grouped matmul against other libraries', compiled ahead of time: no TPU is needed, and nothing is timed.

For each chip, shape and pass: what the compiler accepts, the VMEM it uses, what it leaves around the kernel (copies, transposes,
elementwise passes), and the FLOPs and HBM bytes of the whole program: those of kernels counted from their tiles and grid, those of
everything else from the operands and results in the compiled text. From these two and the chip's published peaks follow
`seconds_counted`, a bound from below that leaves out all overhead, and `roofline_seconds`, the same bound for the work that no
implementation can avoid: useful FLOPs, every operand and result once.

Group sizes are data, so FLOPs and bytes are for groups of equal size that end between tiles.
"""

import contextlib
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from experiments.bench.table import Outcome
from experiments.bench.timing import Timing
from pallas_kernels import grouped_glu, grouped_matmul
from pallas_kernels.ahead import TOPOLOGIES, compile_for, device_of
from pallas_kernels.chips import TPUS, Tpu
from pallas_kernels.grouped_matmul.tiles import Cost, Kernel, Problem, Tiles, choose
from pallas_kernels.implementations import target

CHIPS = tuple(TOPOLOGIES)
PEERS = ("ragged_dot", "megablox", "megablox_large", "tokamax")

# MaxText's tiles for megablox; its own default is 128 cubed.
_LARGE = (512, 1024, 1024)
# Results below this size are not worth a line.
_MATERIALISED = 2**20


@dataclass(frozen=True)
class Shape:
    """m rows of width d in e groups, times matrices [d, f], in bfloat16."""

    name: str
    m: int
    d: int
    f: int
    e: int


SHAPES = {s.name: s for s in (Shape("wide", 8192, 1024, 4096, 32), Shape("deepseek", 8192, 2048, 1408, 64))}


class Contestant(NamedTuple):
    """An implementation.

    Attributes:
      matmul: (x, w, group_sizes) -> y.
      glu: (x, w_gate, w_up, group_sizes) -> h; by default two matmuls with elementwise passes of XLA between.
      tiles: the tiles of one of its Mosaic calls, given the kernel's kind, the sizes and the call's text; None if unknown.
      context: what has to be active while it is compiled for a chip.
    """

    matmul: Callable[[Array, Array, Array], Array]
    tiles: Callable[[Kernel, Problem, str], Tiles | None]
    glu: Callable[[Array, Array, Array, Array], Array] | None = None
    context: Callable[[str], contextlib.AbstractContextManager] = lambda chip: contextlib.nullcontext()


def run(chips: Sequence[str], shapes: Sequence[str], against: Sequence[str] = PEERS) -> Iterator[dict[str, Any]]:
    """A row for each chip, shape, operation, pass and contestant.

    A contestant that is not installed or that the compiler refuses has its reason under `error`, and nothing else.
    """
    for chip in chips:
        for name in shapes:
            for label in ("ours", *against):
                head = dict(chip=chip, shape=name, implementation=label)
                try:
                    contestant = _contestant(label)
                except ImportError as error:
                    yield head | dict(operation="all", error=f"not installed: {error}")
                    continue
                yield from (head | row for row in _rows(chip, SHAPES[name], contestant))


def show(rows: Iterable[dict[str, Any]]) -> None:
    """Prints rows as they come."""
    head = ""
    for row in rows:
        if head != (head := f"{row['chip']}, {row['shape']}"):
            print(
                f"\n{head}\n{'implementation':<16}{'pass':<24}{'roofline us':>12}{'counted us':>11}{'GFLOP':>8}{'wasted':>8}",
                end="",
            )
            print(f"{'HBM MB':>8}{'XLA says':>10}{'VMEM MB':>9}{'compile s':>11}  materialised")
        what = f"{row['operation']} {row.get('pass', '')}"
        if "error" in row:
            print(f"{row['implementation']:<16}{what:<24}{row['error'][:100]}")
            continue
        print(
            f"{row['implementation']:<16}{what:<24}{row['roofline_seconds'] * 1e6:>12.0f}{row['seconds_counted'] * 1e6:>11.0f}"
            f"{row['flops'] / 1e9:>8.0f}{row['flops'] / row['useful_flops'] - 1:>8.0%}{row['hbm_bytes_counted'] / 1e6:>8.0f}"
            f"{row['hbm_bytes_xla'] / 1e6:>10.0f}{row['vmem_bytes'] / 1e6:>9.1f}{row['compile_seconds']:>11.1f}  "
            f"{', '.join(row['materialised']) or '-'}"
        )


def outcomes(rows: Iterable[dict[str, Any]]) -> list[Outcome]:
    """The rows as the cases of a bench, whose limit is the roofline and whose seconds are counted; for its plot."""
    found: dict[str, Outcome] = {}
    for row in rows:
        if "error" in row:
            continue
        case = f"{row['chip']} {row['shape']}"
        outcome = found.setdefault(case, Outcome(case, case, "roofline", {}, "ours"))
        timings = outcome.timings.setdefault(f"{row['operation']} {row['pass']}, counted", {})
        for name, seconds in (("roofline", row["roofline_seconds"]), (row["implementation"], row["seconds_counted"])):
            timings[name] = Timing(seconds, seconds, seconds, row["compile_seconds"], 0)
    return list(found.values())


def _contestant(name: str) -> Contestant:
    """Raises ImportError if it is not installed."""
    if name == "ours":
        ours = lambda *args: grouped_matmul(*args, implementation="tpu")  # noqa: E731
        glu = lambda *args: grouped_glu(*args, implementation="tpu")  # noqa: E731
        return Contestant(ours, lambda kernel, problem, _: choose(kernel, problem), glu)
    if name == "ragged_dot":
        return Contestant(jax.lax.ragged_dot, lambda *_: None)
    if name == "tokamax":
        import tokamax
        from absl import flags, logging

        logging.set_verbosity(logging.ERROR)  # it warns of every shape that it has no tuned tiles for
        if not flags.FLAGS.is_parsed():
            flags.FLAGS(["bench"])  # it reads absl's flags, and would parse this program's command line for them

        # It asks the default device whether it may run, and has its tiles in the compiled text.
        return Contestant(
            lambda *args: tokamax.ragged_dot(*args, implementation="mosaic"),
            _tokamax_tiles,
            context=lambda chip: jax.default_device(device_of(chip)),
        )
    from jax.experimental.pallas.ops.tpu.megablox import ops

    tiling = _LARGE if name == "megablox_large" else (128, 128, 128)
    return Contestant(
        lambda x, w, sizes: ops.gmm(x, w, sizes, x.dtype, tiling),
        lambda *_: Tiles(*tiling, window=tiling[0]),
    )


def _tokamax_tiles(kernel: Kernel, problem: Problem, text: str) -> Tiles | None:
    found = [re.search(rf'tile_{axis}\\*":(\d+)', text) for axis in "mkn"]
    return Tiles(*(int(f[1]) for f in found), window=int(found[0][1])) if all(found) else None


def _rows(chip: str, shape: Shape, contestant: Contestant) -> Iterator[dict[str, Any]]:
    x, h = (jax.ShapeDtypeStruct((shape.m, n), jnp.bfloat16) for n in (shape.d, shape.f))
    w = jax.ShapeDtypeStruct((shape.e, shape.d, shape.f), jnp.bfloat16)
    sizes = jax.ShapeDtypeStruct((shape.e,), jnp.int32)
    matmul = contestant.matmul

    def glu(x: Array, w_gate: Array, w_up: Array, sizes: Array) -> Array:
        if contestant.glu:
            return contestant.glu(x, w_gate, w_up, sizes)
        return jax.nn.silu(matmul(x, w_gate, sizes)) * matmul(x, w_up, sizes)

    def glu_step(x: Array, w_gate: Array, w_up: Array, sizes: Array, dh: Array) -> Any:
        h, pull = jax.vjp(lambda *args: glu(*args, sizes), x, w_gate, w_up)
        return h, pull(dh)

    # Products, arrays of the sizes of x, w and h that are read or written at least once, function, arguments.
    passes = {
        ("matmul", "forward"): (1, (1, 1, 1), matmul, (x, w, sizes)),
        ("matmul", "dx"): (1, (1, 1, 1), lambda x, w, s, dy: jax.vjp(lambda x: matmul(x, w, s), x)[1](dy)[0], (x, w, sizes, h)),
        ("matmul", "dw"): (1, (1, 1, 1), lambda x, w, s, dy: jax.vjp(lambda w: matmul(x, w, s), w)[1](dy)[0], (x, w, sizes, h)),
        ("glu", "forward"): (2, (1, 2, 1), glu, (x, w, w, sizes)),
        ("glu", "forward+backward"): (6, (2, 4, 2), glu_step, (x, w, w, sizes, h)),
    }
    for (operation, name), (products, arrays, function, args) in passes.items():
        useful = products * 2 * shape.m * shape.d * shape.f
        once = sum(n * a.size * a.dtype.itemsize for n, a in zip(arrays, (x, w, h), strict=True))
        head = {"operation": operation, "pass": name, "useful_flops": useful}
        head["roofline_seconds"] = max(useful / TPUS[chip].flops, once / TPUS[chip].bandwidth)
        try:
            with contestant.context(chip):
                start = time.perf_counter()
                compiled = compile_for(chip, function, *args)
                head["compile_seconds"] = time.perf_counter() - start
        except Exception as error:  # whatever a library or the compiler says is the result
            yield head | {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
            continue
        with target(chip):
            yield head | _account(compiled, shape, contestant, TPUS[chip])


def _account(compiled: Any, shape: Shape, contestant: Contestant, chip: Tpu) -> dict[str, Any]:
    instructions = _entry(compiled.as_text())
    sizes = {i.name: i.bytes for i in instructions}
    costs, moved, materialised, vmem, known = [], 0, [], 0, True
    for i in instructions:
        if i.op == "custom-call" and "tpu_custom_call" in i.text:
            vmem = max([vmem, *(int(n) for n in re.findall(r'"used_scoped_memory_configs":\[\{[^]]*?"size":"(\d+)"', i.text))])
            cost = _cost(i, instructions, shape, contestant)
            if cost:
                costs.append(cost)
                continue
            known = known and i.bytes < _MATERIALISED
        elif i.op in _FREE or not i.shapes:
            continue
        moved += i.bytes + sum(sizes.get(name, 0) for name in set(i.operands))
        if i.op != "custom-call" and i.bytes >= _MATERIALISED:
            materialised.append(f"{i.op} {', '.join(f'{dtype}{list(dims)}' for dtype, dims in i.shapes)}")
    analysis = compiled.cost_analysis()
    flops = sum(c.computed_flops for c in costs) if costs and known else int(analysis.get("flops", 0))
    moved += sum(c.bytes for c in costs)
    return {
        "flops": flops,
        "hbm_bytes_xla": int(analysis.get("bytes accessed", 0)),
        "hbm_bytes_counted": moved,
        "vmem_bytes": vmem,
        "seconds_counted": max(flops / chip.flops, moved / chip.bandwidth),
        "materialised": materialised,
    }


def _cost(call: "_Instruction", instructions: list["_Instruction"], shape: Shape, contestant: Contestant) -> Cost | None:
    """What a Mosaic call costs, from its tiles; its sizes follow from its operands and results."""
    by_name = {i.name: i for i in instructions}
    operands = [by_name[name].shapes[0][1] for name in call.operands if name in by_name and by_name[name].shapes]
    rows, matrices = ([dims for dims in operands if len(dims) == n] for n in (2, 3))
    results = [dims for _, dims in call.shapes]
    if not rows or len(results[0]) not in (2, 3):
        return None
    if len(results[0]) == 3:
        kernel, (e, d, f), m = "groups_by_rows", results[0], shape.m
        problem = Problem(m, d, f, e, e, len(rows) - 1, len(results), len(results))
    else:
        kernel, (m, f), d, e = "rows_by_groups", results[0], rows[0][1], matrices[0][0]
        problem = Problem(m, d, f, e, e, len(rows), len(matrices), len(results))
    tiles = contestant.tiles(kernel, problem, call.text)
    return tiles and problem.cost(kernel, tiles.within(d, f))


# Instructions that move nothing: names for parts of arrays, and prefetches into VMEM, whose users are counted.
_FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "copy-start", "copy-done",
         "slice-start", "slice-done", "after-all"}  # fmt: skip
_BYTES = {"bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "pred": 1, "s8": 1, "u8": 1}


class _Instruction(NamedTuple):
    """One instruction of the compiled program's entry computation; `shapes` are of its results that are arrays."""

    name: str
    op: str
    shapes: list[tuple[str, tuple[int, ...]]]
    operands: list[str]
    text: str
    root: bool

    @property
    def bytes(self) -> int:
        total = 0
        for dtype, dims in self.shapes:
            size = _BYTES.get(dtype, 4)
            for n in dims:
                size *= n
            total += size
        return total


def _entry(text: str) -> list[_Instruction]:
    """The instructions of the entry computation."""
    entry = text[text.index("\nENTRY") :]
    instructions = []
    for text in re.split(r"\n(?=  (?:ROOT )?%)", entry[: entry.index("\n}\n")])[1:]:
        found = re.match(r"\s*(ROOT )?%(\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*)", text)
        if not found:
            continue
        root, name, results, op, rest = found.groups()
        shapes = [(t, tuple(int(n) for n in dims.split(",") if n)) for t, dims in re.findall(r"(\w+)\[([\d,]*)\]", results)]
        operands = re.findall(r"%([\w.-]+)", rest.split("), ")[0])
        instructions.append(_Instruction(name, op, shapes, operands, text, bool(root)))
    return instructions
