"""What a compiled program exchanges between devices: every collective, its bytes, its mesh axes, and what hides it.

found = collectives(compiled.as_text(), mesh)
sum(c.sent * c.times for c in found if c.axes == ("expert",))   # bytes that one device sends over that axis in a step
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jax.sharding import Mesh

from moejax.aot.hlo_text import Computation, Instruction, Module, parse, shape_bytes, shape_dtype

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# What keeps a device busy while a transfer is under way. Loops and calls hold such work.
COMPUTE = ("fusion", "dot", "convolution", "custom-call", "while", "call", "conditional", "sort", "reduce", "scatter", "gather")
# Custom calls by which the TPU compiler names memory, and does nothing.
_NO_WORK = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "Sharding", "PinToDevice")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between devices in a compiled program.

    Attributes:
      kind: one of `KINDS`. What the TPU compiler calls an all-reduce fused with a slice of its result is a reduce-scatter.
      axes: mesh axes along which the devices of a group differ, in mesh order. A group may be only a part of them.
      group: devices in a group; of a permutation, 2.
      operand_bytes: what one device puts in.
      result_bytes: what one device gets out.
      times: how often one run of the program does it: trip counts of the loops around it, multiplied.
      known: whether all these trip counts are known; a loop of unknown length counts once.
      overlapped: whether computation is scheduled between its start and its end.
      dtype: XLA's name of the first operand's type.
      where: the traced operation that it comes from, for example 'jit(step)/while/body/all_to_all'.
      name: the instruction.
    """

    kind: str
    axes: tuple[str, ...]
    group: int
    operand_bytes: int
    result_bytes: int
    times: int
    known: bool
    overlapped: bool
    dtype: str
    where: str
    name: str

    @property
    def sent(self) -> float:
        """Bytes that one device has to send, once, by the cheapest algorithm: a ring, or straight to each receiver.

        Of a ragged all-to-all this is what buffers allow; how much is sent is data.
        """
        others = (self.group - 1) / self.group if self.group else 0.0
        match self.kind:
            case "all-gather":
                return self.result_bytes * others
            case "all-reduce":
                return 2 * self.operand_bytes * others
            case "reduce-scatter" | "all-to-all" | "ragged-all-to-all":
                return self.operand_bytes * others
        return float(self.operand_bytes)


def collectives(program: str | Module, mesh: Mesh | Mapping[str, int] | None = None) -> list[Collective]:
    """Every collective of a compiled program.

    Args:
      program: `compiled.as_text()`, or what `hlo_text.parse` made of it.
      mesh: what it was compiled for, for the names of axes; a mapping has axes and sizes in order. Without it `axes` is empty.
    """
    module = parse(program) if isinstance(program, str) else program
    sizes = dict(mesh.shape) if isinstance(mesh, Mesh) else dict(mesh or {})
    found = []
    for computation, times, known in module.runs():
        for exchange in _exchanges(module, computation):
            axes, group = _groups(exchange.inner, sizes)
            found.append(
                Collective(
                    kind=exchange.kind,
                    axes=axes,
                    group=group,
                    operand_bytes=sum(map(shape_bytes, exchange.operands)),
                    result_bytes=shape_bytes(exchange.result),
                    times=times,
                    known=known,
                    overlapped=exchange.overlapped,
                    dtype=shape_dtype(exchange.operands[0]) if exchange.operands else "",
                    where=exchange.inner.op_name or exchange.outer.op_name,
                    name=exchange.outer.name,
                )
            )
    return found


@dataclasses.dataclass(frozen=True)
class _Exchange:
    kind: str
    outer: Instruction  # in the computation that runs
    inner: Instruction  # the collective itself, which may be inside a fusion or an async wrapper
    operands: Sequence[str]  # shapes
    result: str
    overlapped: bool


def _exchanges(module: Module, computation: Computation) -> Iterator[_Exchange]:
    """The collectives of one computation in the order of its schedule, asynchronous ones where they start."""
    for position, instruction in enumerate(computation.instructions):
        kind = instruction.op.removesuffix("-start")
        if kind in KINDS:
            operands = computation.operand_shapes(instruction)
            if instruction.op == kind:
                yield _Exchange(kind, instruction, instruction, _data(kind, operands), instruction.shape, False)
            else:
                done = _done(computation, instruction)
                result = done.shape if done else instruction.shape
                busy = _busy(module, computation, position, done)
                yield _Exchange(kind, instruction, instruction, _data(kind, operands), result, busy)
        elif instruction.op in ("async-start", "fusion"):
            yield from _wrapped(module, computation, position)


def _wrapped(module: Module, computation: Computation, position: int) -> Iterator[_Exchange]:
    """The collectives inside a fusion or a generic async operation."""
    outer = computation.instructions[position]
    body = module.computations[outer.calls("calls")]
    for inner in body.instructions:
        if inner.op not in KINDS:
            continue
        operands = _data(inner.op, body.operand_shapes(inner))
        if outer.op == "async-start":
            done = _done(computation, outer)
            yield _Exchange(inner.op, outer, inner, operands, inner.shape, _busy(module, computation, position, done))
        elif _target(body.root) == "AsyncCollectiveStart":
            # TPU: start, any number of fusions that carry the transfer along beside their own work, done; one channel.
            between = _until_channel_ends(module, computation, position, inner)
            yield _Exchange(inner.op, outer, inner, operands, inner.shape, any(_works(module, i) for i in between))
        elif not _continues(body, inner):
            sliced = inner.op == "all-reduce" and body.root.op == "dynamic-slice"
            yield _Exchange("reduce-scatter" if sliced else inner.op, outer, inner, operands, outer.shape, False)


def _continues(body: Computation, inner: Instruction) -> bool:
    """Whether a fusion only carries on a transfer that another one has started."""
    return "chain_id=" in inner.attributes and (
        _target(body.root) == "AsyncCollectiveDone" or body.name.startswith("async_collective_fusion")
    )


def _until_channel_ends(module: Module, computation: Computation, position: int, started: Instruction) -> Iterator[Instruction]:
    for instruction in computation.instructions[position + 1 :]:
        if instruction.op == "fusion":
            body = module.computations[instruction.calls("calls")]
            same = any(i.op == started.op and _channel(i) == _channel(started) for i in body.instructions)
            if same and _target(body.root) == "AsyncCollectiveDone":
                return
        yield instruction


def _done(computation: Computation, start: Instruction) -> Instruction | None:
    """What ends an asynchronous operation, past any update; None if that is in another turn of the loop."""
    name = start.name
    for instruction in computation.instructions:
        if instruction.operands[:1] == (name,):
            if instruction.op.endswith("-done"):
                return instruction
            if instruction.op.endswith("-update"):
                name = instruction.name
    return None


def _busy(module: Module, computation: Computation, position: int, done: Instruction | None) -> bool:
    """Whether any work is scheduled from a start to its end."""
    for instruction in computation.instructions[position + 1 :]:
        if instruction is done:
            return False
        if _works(module, instruction):
            return True
    return False


def _works(module: Module, instruction: Instruction) -> bool:
    if instruction.op == "fusion":
        root = module.computations[instruction.calls("calls")].root
        return _target(root) not in ("AsyncCollectiveStart", "AsyncCollectiveDone")
    return instruction.op in COMPUTE and _target(instruction) not in _NO_WORK


def _target(instruction: Instruction) -> str:
    return (instruction.attribute("custom_call_target") or "").strip('"') if instruction.op == "custom-call" else ""


def _channel(instruction: Instruction) -> str | None:
    return instruction.attribute("channel_id")


def _data(kind: str, operands: Sequence[str]) -> Sequence[str]:
    """Shapes of what is exchanged: a ragged all-to-all also takes where to write, offsets and sizes."""
    return operands[:1] if kind == "ragged-all-to-all" else operands


def _groups(instruction: Instruction, sizes: Mapping[str, int]) -> tuple[tuple[str, ...], int]:
    """Mesh axes and size of an exchange's groups. Device numbers are positions in the mesh."""
    if pairs := instruction.attribute("source_target_pairs"):
        groups, size = _numbers(pairs), 2
    else:
        groups = _replica_groups(instruction, math.prod(sizes.values()))
        size = max((len(group) for group in groups), default=1)
    if not sizes or not groups:
        return (), size
    differ = np.zeros(len(sizes), bool)
    for group in groups:
        coordinates = np.stack(np.unravel_index(group, tuple(sizes.values())))
        differ |= (coordinates != coordinates[:, :1]).any(axis=1)
    return tuple(name for name, d in zip(sizes, differ, strict=True) if d), size


# XLA's three spellings of groups: `{{0,1},{2,3}}`; `[2,4]<=[2,4]T(1,0)`, rows of a transposed count; and along axes of a mesh of
# XLA's own making, `mesh['a'=2,'b'=4], device_ids=([2,4]T(1,0)) {'b'}`.
_MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(((?:\[[\d,]+\](?:T\([\d,]+\))?|[\d,\s]+))\))? \{([^}]*)\}"
)


def _replica_groups(instruction: Instruction, devices: int) -> list[list[int]]:
    """The groups; none written down means that all devices are one."""
    if match := _MESH_GROUPS.search(instruction.attributes):
        axes = [(name, int(size)) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])]
        shape = [size for _, size in axes]
        ids = _counted(match[2]) if match[2] else np.arange(math.prod(shape))
        return _along(ids.reshape(shape), [name for name, _ in axes], match[3])
    text = instruction.attribute("replica_groups") or ""
    if match := re.match(r"\[([\d,]+)\]<=(.*)$", text):
        return _counted(match[2]).reshape([int(n) for n in match[1].split(",")]).tolist()
    return _numbers(text) or ([list(range(devices))] if devices > 1 else [])


def _along(ids: np.ndarray, names: Sequence[str], axes: str) -> list[list[int]]:
    """Groups of the devices that differ in `axes`: names, or parts of them, `'a':(1)2` for 2 ways after the first 1."""
    shape: list[int] = []
    picked: list[bool] = []
    wanted = {name: (int(pre or 1), int(size or 0)) for name, pre, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)}
    for name, total in zip(names, ids.shape, strict=True):
        if name not in wanted:
            shape, picked = [*shape, total], [*picked, False]
            continue
        before, size = wanted[name][0], wanted[name][1] or total
        shape, picked = [*shape, before, size, total // (before * size)], [*picked, False, True, False]
    inside = [i for i, p in enumerate(picked) if p]
    outside = [i for i, p in enumerate(picked) if not p]
    width = math.prod(shape[i] for i in inside)
    return ids.reshape(shape).transpose(outside + inside).reshape(-1, width).tolist()


def _counted(text: str) -> np.ndarray:
    """`[2,4]T(1,0)`: 0, 1, 2 ... in that shape, transposed, then flat. Or plain numbers."""
    match = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if match is None:
        return np.array([int(n) for n in re.findall(r"\d+", text)])
    shape = [int(n) for n in match[1].split(",")]
    ids = np.arange(math.prod(shape)).reshape(shape)
    return (ids.transpose([int(n) for n in match[2].split(",")]) if match[2] else ids).reshape(-1)


def _numbers(text: str) -> list[list[int]]:
    return [[int(n) for n in re.findall(r"\d+", group)] for group in re.findall(r"\{([\d,\s]+)\}", text)]
