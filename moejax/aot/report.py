"""What a config's train step needs of each device of a topology, by the real compiler and without the devices.

report = make_report("mixtral", config, topology("v5e:16x16"))
report.memory.total, report.costs.seconds, report.exchanges
"""

import dataclasses
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from moejax.aot.ahead import DoesNotFit, Topology, compile_lowered, compiler_options, lower_train, program_for
from moejax.aot.cost import Costs, costs
from moejax.aot.hlo import Collective, collectives
from moejax.aot.hlo_text import parse
from moejax.parallel.mesh import BATCH_AXES, describe
from moejax.train.program import Program

GB = 1e9


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
      parameters: those that learn, as the mesh splits them.
      frozen: those that do not, likewise: the model's, and the models that the task runs beside it.
      optimizer: likewise; of what learns only.
      inputs: what else the program is given: the batch, router state, counters, and padding of all arguments.
      temporaries: what it makes and drops, at the peak: activations, gathered parameters, gradients.
      results: what it returns that does not take the place of an argument.
      code: the program itself.
      limit: what the chip has for programs; None of a CPU.
    """

    parameters: int
    frozen: int
    optimizer: int
    inputs: int
    temporaries: int
    results: int
    code: int
    limit: int | None

    @property
    def arguments(self) -> int:
        """All that the program is given."""
        return self.parameters + self.frozen + self.optimizer + self.inputs

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries + self.results + self.code


@dataclasses.dataclass(frozen=True)
class Exchanged:
    """All exchanges of one kind along the same axes.

    Attributes:
      kind: one of `hlo.KINDS`.
      axes: mesh axes along which the devices of a group differ.
      group: devices that take part in one.
      count: exchanges in a step.
      bytes: that one device sends in a step.
      overlapped: share of these bytes beside which something is computed.
      known: whether all loops around them have a known length.
    """

    kind: str
    axes: tuple[str, ...]
    group: int
    count: int
    bytes: float
    overlapped: float
    known: bool


@dataclasses.dataclass(frozen=True)
class Report:
    """What compiling a train step tells.

    Attributes:
      name: of the config.
      topology: 'v5e:16x16'.
      devices: how many.
      mesh: its axes, 'data=2,expert=4'.
      tokens: of one batch, over all devices; examples for tasks that count those.
      params: parameters of the model.
      active_params: those that one token uses.
      trainable_params: those that learn.
      memory: of one device.
      costs: what the compiled program does on one device.
      exchanges: by kind and axes, largest first.
      trace_seconds: to trace the step on this machine.
      compile_seconds: to compile it.
    """

    name: str
    topology: str
    devices: int
    mesh: str
    tokens: int
    params: int
    active_params: int
    trainable_params: int
    memory: Memory
    costs: Costs
    exchanges: tuple[Exchanged, ...]
    trace_seconds: float
    compile_seconds: float

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON has them, with what follows from them."""
        found = dataclasses.asdict(self)
        found["memory"] |= {"arguments": self.memory.arguments, "total": self.memory.total}
        found["costs"] |= {"estimated_seconds": self.costs.seconds}
        return found


def make_report(
    name: str, config: Mapping[str, Any] | ConfigDict, where: Topology, say: Callable[[str], None] = lambda phase: None
) -> Report:
    """Traces, compiles and reads the train step: seconds for tiny models, a minute or two for large ones.

    Args:
      name: of the config, for the reader.
      config: what `fit` would be given.
      where: devices to compile for.
      say: told the phase that begins: 'tracing', 'compiling', 'reading'.

    Raises:
      ConfigError: the config is wrong, or its sizes do not divide as its mesh asks.
      DoesNotFit: it needs more memory than there is; says what takes it and what to change.
    """
    say("tracing")
    began = time.perf_counter()
    program = program_for(config, where)
    held = held_bytes(program)
    lowered = lower_train(program, where)
    traced = time.perf_counter()
    say("compiling")
    try:
        compiled = compile_lowered(lowered, where, compiler_options(program, where))
    except DoesNotFit as error:
        raise DoesNotFit(f"{name} does not fit {where.name}: {error}; {_advice(program, held, where)}") from error
    done = time.perf_counter()
    say("reading")
    memory = _memory(compiled, held, where)
    if memory.limit is not None and memory.total > memory.limit:
        needs = f"it needs {memory.total / GB:.2f} GB a chip, and {where.kind} has {memory.limit / GB:.2f} GB for programs"
        raise DoesNotFit(f"{name} does not fit {where.name}: {needs}; {_advice(program, held, where)}")
    module = parse(compiled.as_text())
    found = collectives(module, program.parallel.mesh)
    return Report(
        name=name,
        topology=where.name,
        devices=len(where.devices),
        mesh=describe(program.parallel.mesh),
        tokens=program.task.size(program.batch),
        params=program.params,
        active_params=program.active_params,
        trainable_params=program.trainable_params,
        memory=memory,
        costs=costs(module, found, where.chip),
        exchanges=summarise(found),
        trace_seconds=traced - began,
        compile_seconds=done - traced,
    )


def held_bytes(program: Program) -> dict[str, int]:
    """Bytes of `parameters` that learn, what is `frozen`, `optimizer` and `inputs` on each device, as the mesh splits them."""
    state = program.state
    learned, kept = program.learning.split(state.params)
    held = {
        "parameters": learned,
        "frozen": (kept, state.frozen),
        "optimizer": state.opt_state,
        "inputs": (state.step, state.collections, state.key, state.first_bad_step, program.batch),
    }
    return {name: sum(map(_shard_bytes, jax.tree.leaves(tree))) for name, tree in held.items()}


def summarise(found: Sequence[Collective]) -> tuple[Exchanged, ...]:
    """Exchanges added up by kind and axes, those that send most first."""
    groups: dict[tuple[str, tuple[str, ...], int], list[Collective]] = defaultdict(list)
    for collective in (c for c in found if c.group > 1):
        groups[collective.kind, collective.axes, collective.group].append(collective)
    rows = []
    for (kind, axes, group), members in groups.items():
        sent = sum(c.times * c.sent for c in members)
        hidden = sum(c.times * c.sent for c in members if c.overlapped)
        count, known = sum(c.times for c in members), all(c.known for c in members)
        rows.append(Exchanged(kind, axes, group, count, sent, hidden / sent if sent else 0.0, known))
    return tuple(sorted(rows, key=lambda row: -row.bytes))


def advice(kept: int, limit: int, sizes: Mapping[str, int], rows: int, accumulation: int, remat: str | None) -> str:
    """Which key to change for a step that needs too much: a sentence without its full stop.

    Args:
      kept: bytes of parameters and optimizer on a device.
      limit: what the device has.
      sizes: of the mesh's axes.
      rows: of the whole batch.
      accumulation: microbatches.
      remat: the model's; None for a model without.
    """
    if kept > limit / 2:
        what = f"parameters and optimizer take {kept / GB:.2f} GB of it"
        if sizes["data"] > 1:
            return f"{what}: split them over more devices, with fsdp={sizes['fsdp'] * sizes['data']} instead of data={sizes['data']}"
        return f"{what} on all {math.prod(sizes.values())} devices: take a larger slice, a smaller d_model or fewer experts"
    what = f"parameters and optimizer take only {kept / GB:.2f} GB of it, the rest are activations and gathered parameters"
    if remat not in (None, "full"):
        return f"{what}: set model.remat='full' (now '{remat}')"
    each = rows // (math.prod(sizes[axis] for axis in BATCH_AXES) * accumulation)
    if each > 1:
        return (
            f"{what}: {each} rows of the batch are on each device at a time; lower data.batch_size from {rows} to {rows // each}, "
            f"or raise train.accumulation from {accumulation} to {accumulation * each}"
        )
    return f"{what}, at one row a device: raise tensor={sizes['tensor']} in mesh, or lower the row's length (data.seq_len)"


def _advice(program: Program, held: Mapping[str, int], where: Topology) -> str:
    rows = next(iter(program.batch.values())).shape[0]
    kept, sizes = held["parameters"] + held["frozen"] + held["optimizer"], dict(program.parallel.mesh.shape)
    return advice(kept, where.chip.hbm, sizes, rows, program.accumulation, getattr(program.model, "remat", None))


def _memory(compiled: jax.stages.Compiled, held: Mapping[str, int], where: Topology) -> Memory:
    found = compiled.memory_analysis()
    kept = held["parameters"] + held["frozen"] + held["optimizer"]
    return Memory(
        parameters=held["parameters"],
        frozen=held["frozen"],
        optimizer=held["optimizer"],
        inputs=max(0, found.argument_size_in_bytes - kept),
        temporaries=found.temp_size_in_bytes,
        results=max(0, found.output_size_in_bytes - found.alias_size_in_bytes),
        code=found.generated_code_size_in_bytes,
        limit=where.chip.hbm if where.chip else None,
    )


def _shard_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    size = (
        jax.dtypes.canonicalize_dtype(leaf.dtype).itemsize if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else 8
    )
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * size
