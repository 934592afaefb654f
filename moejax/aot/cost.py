"""What one run of a compiled program computes and moves on each device, read from its text.

XLA's own cost analysis counts the body of a loop once, so a model that scans over 32 layers would look 32 times cheaper in
them. Here a loop counts as often as it turns.
"""

import dataclasses
import json
import math
import re
from collections.abc import Sequence

from moejax.aot.hlo import KINDS, Collective
from moejax.aot.hlo_text import Computation, Instruction, Module, shape_bytes, shape_dims
from pallas_kernels.chips import Tpu

# What costs no traffic of its own: names, views, and the ends of what was started before.
_FREE = (
    "parameter",
    "constant",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
    "partition-id",
)
# Ops that read a window of their first operand.
_WINDOWS = ("dynamic-slice", "slice", "gather")


@dataclasses.dataclass(frozen=True)
class Costs:
    """Of one device and one run of the program.

    Attributes:
      flops: of matrix products and convolutions, and what kernels say of themselves.
      bytes: read from and written to HBM (on a CPU, memory), without those of exchanges.
      compute_seconds: each operation at the chip's peak or at its bandwidth, whichever takes longer; one after the other.
      exchange_seconds: what it sends, at the rate of all its links together.
      exposed_seconds: the part of that beside which nothing is computed.
    """

    flops: float
    bytes: float
    compute_seconds: float | None
    exchange_seconds: float | None
    exposed_seconds: float | None

    @property
    def seconds(self) -> float | None:
        """An estimate of the step's time, from published peak rates: real chips do not reach them. None without a chip."""
        if self.compute_seconds is None:
            return None
        return max(self.compute_seconds + self.exposed_seconds, self.exchange_seconds)


def costs(module: Module, exchanges: Sequence[Collective] = (), chip: Tpu | None = None) -> Costs:
    """Counts a program that `hlo_text.parse` has read.

    Args:
      module: the program.
      exchanges: its collectives, from `hlo.collectives`, for the time they take.
      chip: what it runs on; without it there are no times.
    """
    flops = moved = seconds = 0.0
    for computation, times, _ in module.runs():
        for instruction in computation.instructions:
            f, b = _work(module, computation, instruction)
            flops, moved = flops + times * f, moved + times * b
            # A copy that is only started runs beside other work.
            if chip is not None and not instruction.op.endswith("-start"):
                seconds += times * max(f / chip.flops, b / chip.bandwidth)
    if chip is None:
        return Costs(flops, moved, None, None, None)
    spent = [(c.times * c.sent / chip.links, c.overlapped) for c in exchanges]
    return Costs(
        flops,
        moved,
        max(seconds, moved / chip.bandwidth),
        sum(s for s, _ in spent),
        sum(s for s, hidden in spent if not hidden),
    )


def _work(module: Module, computation: Computation, instruction: Instruction) -> tuple[float, float]:
    """FLOPs and bytes of one instruction of a computation that runs as such."""
    op = instruction.op
    if op in _FREE or op.removesuffix("-start") in KINDS or op.endswith(("-done", "-update")):
        return 0.0, 0.0
    if estimate := re.search(r'"cost_estimate":(\{[^}]*\})', instruction.attributes):
        known = json.loads(estimate[1])
        return float(known["flops"]), float(known["bytes_accessed"])
    if op == "fusion":
        body = module.computations[instruction.calls("calls")]
        return _fused_flops(module, body), _fused_bytes(module, body, computation, instruction)
    operands = computation.operand_shapes(instruction)
    flops = _flops(computation, instruction)
    if op.endswith("-start"):
        return flops, 2.0 * sum(map(in_hbm, operands))
    if op == "dynamic-update-slice":
        return flops, 2.0 * in_hbm(operands[1])
    if op in _WINDOWS:
        return flops, 2.0 * in_hbm(instruction.shape)
    return flops, float(sum(map(in_hbm, operands)) + in_hbm(instruction.shape))


def _fused_flops(module: Module, body: Computation) -> float:
    total = 0.0
    for instruction in body.instructions:
        if instruction.op == "fusion":
            total += _fused_flops(module, module.computations[instruction.calls("calls")])
        else:
            total += _flops(body, instruction)
    return total


def _fused_bytes(module: Module, body: Computation, outer: Computation, fusion: Instruction) -> float:
    """Operands and results of a fusion; of an operand or a result of which only a window is touched, that window.

    What a fusion passes on, so that a transfer goes on beside its own work, costs nothing.
    """
    total = 0.0
    for parameter in (i for i in body.instructions if i.op == "parameter"):
        whole = in_hbm(outer.by_name[fusion.operands[int(parameter.operands[0])]].shape)
        users = [
            (user, name)
            for user, name in _users(body, parameter.name)
            if not (_passes(user) or (user is body.root and user.op == "tuple"))
        ]
        if whole and users and all(user.op in _WINDOWS and user.operands[0] == name for user, name in users):
            total += min(whole, sum(shape_bytes(user.shape) for user, _ in users))
        elif any(user.op != "dynamic-update-slice" or user.operands[0] != name for user, name in users):
            total += whole
    several = body.root.op == "tuple"
    for result in [body.by_name[name] for name in body.root.operands] if several else [body.root]:
        written = in_hbm(result.shape if several else fusion.shape)
        if result.op == "dynamic-update-slice" and written:
            written = min(written, shape_bytes(body.by_name[result.operands[1]].shape))
        total += 0 if _passes(result) or result.op == "parameter" else written
    return total


def _passes(instruction: Instruction) -> bool:
    """Whether this belongs to a transfer."""
    return instruction.op in KINDS or "AsyncCollective" in (instruction.attribute("custom_call_target") or "")


def _users(body: Computation, name: str) -> list[tuple[Instruction, str]]:
    """Who reads a value, with the name by which they do, past changes of view."""
    found = []
    for instruction in body.instructions:
        if name in instruction.operands and instruction.op != "parameter":
            if instruction.op == "bitcast":
                found += _users(body, instruction.name)
            else:
                found.append((instruction, name))
    return found


def in_hbm(shape: str) -> int:
    """Bytes of the arrays of a shape that lie in a device's main memory, not in a memory space that the layout numbers."""
    return sum(
        shape_bytes(array) for array in re.findall(r"\w+\[[\d,]*\](?:\{[^}]*\})?", shape) if not re.search(r"S\(\d+\)", array)
    )


def _flops(computation: Computation, instruction: Instruction) -> float:
    match instruction.op:
        case "dot":
            lhs = shape_dims(computation.by_name[instruction.operands[0]].shape)
            contracted = re.findall(r"\d+", instruction.attribute("lhs_contracting_dims") or "")
            return 2.0 * math.prod(shape_dims(instruction.shape)) * math.prod(lhs[int(i)] for i in contracted)
        case "convolution":
            return _convolution(computation, instruction)
    return 0.0


def _convolution(computation: Computation, instruction: Instruction) -> float:
    """2 per multiply-add of positions that lie within the input: TPUs' batched products are convolutions with a dilated window."""
    lhs, rhs = (shape_dims(computation.by_name[name].shape) for name in instruction.operands)
    out = shape_dims(instruction.shape)
    lhs_labels, rhs_labels, out_labels = re.split(r"_|->", instruction.attribute("dim_labels") or "")
    total = 2.0 * out[out_labels.index("b")] * out[out_labels.index("f")] * rhs[rhs_labels.index("i")]
    window = instruction.attribute("window") or ""
    for i in range(len(out) - 2):
        low = int(_entry(window, "pad", i, "0_0").partition("_")[0])
        stride, spread, dilation = (int(_entry(window, name, i, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate"))
        size, last = int(_entry(window, "size", i, "1")), (lhs[lhs_labels.index(str(i))] - 1) * spread
        places = (o * stride + k * dilation - low for o in range(out[out_labels.index(str(i))]) for k in range(size))
        total *= sum(0 <= place <= last and place % spread == 0 for place in places)
    return total


def _entry(window: str, name: str, dimension: int, default: str) -> str:
    """`4` of `{size=8x4 stride=7x1}` for the size of dimension 1."""
    match = re.search(rf"\b{name}=([^\s}}]+)", window)
    return match[1].split("x")[dimension] if match else default
