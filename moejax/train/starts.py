"""`config.init`: what a run starts from. A source, perhaps some others, and surgeries in order; then every array must fit.

    init = {'source': {'kind': 'checkpoint', 'path': 'runs/dense'}}
    init = {'source': {'kind': 'run', 'config': {...}, 'seed': 0}, 'surgeries': {'extend': {'paths': ('head',)}}}
    init = {
        'source': {'kind': 'run', 'config': start},
        'others': {'code': {'kind': 'run', 'config': code}, 'prose': {'kind': 'run', 'config': prose}},
        'surgeries': {'merge': {'kind': 'average'}, 'head': {'kind': 'keep', 'without': ('head',)}, 'new': {'kind': 'extend', ...}},
        'order': ('merge', 'head', 'new'),
    }

The result has exactly the arrays of the model that `config.model` describes: what is missing or left over is an error. New
parameters are new on purpose: by the surgery `extend`, or because they are an adapter's. Adapters are made last, beside the rest.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax

from moejax.core.errors import ConfigError, nearest
from moejax.core.fields import fits, short
from moejax.core.params import Path
from moejax.core.paths import listed
from moejax.surgery.base import Checkpoint, Leaves, Surgery, Target, spelt, surgeries
from moejax.surgery.sources.base import Reader, Source, network_of, sources
from moejax.surgery.sources.fresh import FreshSource
from moejax.tasks.base import Task
from moejax.train.program import Program
from moejax.train.readers import Resolve, make_reader, on_host
from moejax.train.settings import UNTRAINED

# Folded into a run's key for what surgeries draw; far from the small numbers that `jax.random.split` stands for.
SURGERY = 0x73757267

Batches = Callable[[int], Sequence[Mapping[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Init:
    """`config.init`, built.

    Attributes:
      source: what the run starts from.
      others: further models, for surgeries that want several.
      surgeries: name and operation, in order.
    """

    source: Source
    others: Mapping[str, Source]
    surgeries: tuple[tuple[str, Surgery], ...]


def parse_init(spec: Mapping[str, Any] | None) -> Init:
    """The `init` section of a config.

    Raises:
      ConfigError: an unknown key or kind, or several surgeries without an order.
    """
    spec = spec or UNTRAINED
    keys = ("source", "others", "surgeries", "order")
    for key in spec:
        if key not in keys:
            raise ConfigError(f"unknown key '{key}' in init{nearest(key, keys)}")
    named = {name: fields for name, fields in (spec.get("surgeries") or {}).items() if fields is not None}
    others = {name: fields for name, fields in (spec.get("others") or {}).items() if fields is not None}
    operations = {name: _surgery(name, fields) for name, fields in named.items()}
    order = spec.get("order") or ()
    if not fits(order, tuple[str, ...] | list[str]):
        raise ConfigError(f"init.order={short(order)} must be a tuple of names of init.surgeries")
    return Init(
        sources.build(spec.get("source") or UNTRAINED["source"], "init.source"),
        {name: sources.build(fields, f"init.others.{name}") for name, fields in others.items()},
        tuple((name, operations[name]) for name in _order(tuple(order), operations)),
    )


def starting(
    init: Init, program: Program, config: Mapping[str, Any], seed: int, resolve: Resolve, batches: Batches, label: str = ""
) -> tuple[dict[str, Any], dict[str, str]]:
    """The variables that a run starts with, as NumPy arrays, and what checkpoints they were made of.

    Args:
      init: the section.
      program: of the run.
      config: plain config of the run.
      seed: of the run.
      resolve: gives the folder of the finished run of another config.
      batches: the first batches of its training data.
      label: its name, in progress reports.

    Raises:
      ConfigError: the arrays are not those of the model; names the first few.
    """
    shapes, root = program.state.variables, jax.random.key(seed)
    wanted = Checkpoint(config, shapes).leaves

    def fresh(paths: Collection[Path]) -> Leaves:
        return program.fresh(paths, root)

    def reader(place: str) -> Reader:
        return make_reader(place, seed, lambda: Checkpoint(config, {}).with_leaves(fresh(sorted(wanted))), resolve, label)

    def read(source: Source, place: str) -> Checkpoint:
        return on_host(source.read(reader(place)))

    def missing_from(found: Checkpoint) -> list[Path]:
        """The adapters' own arrays that are not there yet, once everything else is found to fit."""
        leaves = found.leaves
        new = [path for path in wanted if path not in leaves and program.is_adapter(path)]
        rest = {path: x for path, x in wanted.items() if path not in new}
        check_fit(found, rest, "init", "rename, keep, extend or convert them with init.surgeries")
        return sorted(new)

    if not init.surgeries and not isinstance(init.source, FreshSource):
        # What does not fit is said before it is trained.
        network = init.source.network(reader("init.source"))
        if network != network_of(config):
            missing_from(Checkpoint(config, program.shapes_of(network)))
    found = read(init.source, "init.source")
    others = {name: read(source, f"init.others.{name}") for name, source in sorted(init.others.items())}
    given = {"init.source": found, **{f"init.others.{name}": one for name, one in others.items()}}
    for i, (name, operate) in enumerate(init.surgeries):
        key = jax.random.fold_in(jax.random.fold_in(root, SURGERY), i)
        target = Target(config, shapes, program.parameters, key, others, fresh, batches)
        try:
            found = operate(found, target)
        except ConfigError as error:
            raise ConfigError(f"{error} (in init.surgeries.{name})") from None
    found = on_host(found)
    new = missing_from(found)
    found = found.with_leaves({**found.leaves, **(program.fresh(new, root, found.leaves) if new else {})})
    made_of = {place: one.meta["contents"] for place, one in given.items() if "contents" in one.meta}
    return _like(found, shapes), made_of


def frozen_models(
    task: Task, shapes: Mapping[str, Any], seed: int, resolve: Resolve, label: str = ""
) -> tuple[dict[str, Any], dict[str, str]]:
    """The variables of a task's frozen models, by name, as NumPy arrays, and what checkpoints they are.

    Raises:
      ConfigError: the arrays are not those of the source's own model.
    """

    def refuse() -> Checkpoint:
        raise ConfigError("a frozen model must be trained; take another kind of source than 'fresh'")

    found, made_of = {}, {}
    for name, source in sorted(task.frozen().items()):
        place = f"task.{name}"
        checkpoint = source.read(make_reader(place, seed, refuse, resolve, label))
        check_fit(checkpoint, Checkpoint({}, shapes[name]).leaves, place, "its config.model is not what it was trained with")
        found[name] = _like(on_host(checkpoint), shapes[name])
        made_of |= {place: checkpoint.meta["contents"]} if "contents" in checkpoint.meta else {}
    return found, made_of


def check_fit(found: Checkpoint, wanted: Mapping[Path, Any], place: str, fix: str) -> None:
    """Refuses arrays that are not exactly those of a model: path by path, in shape and type.

    Raises:
      ConfigError: names the first few that are missing, left over, or of another shape.
    """
    leaves = found.leaves
    missing = [f"{spelt(path)} {_shape(x)}" for path, x in wanted.items() if path not in leaves]
    over = [f"{spelt(path)} {_shape(x)}" for path, x in leaves.items() if path not in wanted]
    other = [
        f"{spelt(path)} {_shape(leaves[path])}, where the model has {_shape(x)}"
        for path, x in wanted.items()
        if path in leaves and _shape(leaves[path]) != _shape(x)
    ]
    words = {"missing": missing, "left over": over, "of another shape": other}
    said = [f"{len(names)} {word} ({listed(names, 3)})" for word, names in words.items() if names]
    if said:
        raise ConfigError(f"{place}: the arrays are not those of the model: {'; '.join(said)}; {fix}")


def _surgery(name: str, fields: Any) -> Surgery:
    where = f"init.surgeries.{name}"
    if not hasattr(fields, "items"):
        raise ConfigError(f"{where}={fields!r} must be a mapping of fields, or None to leave it out")
    return surgeries.build({"kind": name, **fields}, where)


def _order(order: tuple[str, ...], operations: Mapping[str, Surgery]) -> tuple[str, ...]:
    for name in order:
        if name not in operations:
            raise ConfigError(f"init.order names '{name}', not in init.surgeries{nearest(name, operations)}")
    if not order and len(operations) > 1:
        raise ConfigError(f"init.surgeries has {', '.join(operations)}; say in init.order which comes first")
    if order and sorted(order) != sorted(operations):
        raise ConfigError(f"init.order={order} must name each of init.surgeries once: {', '.join(operations)}")
    return order or tuple(operations)


def _like(checkpoint: Checkpoint, shapes: Any) -> dict[str, Any]:
    """The variables as a tree of the very structure of `shapes`."""
    leaves = checkpoint.leaves
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[tuple(key.key for key in path)], dict(shapes))


def _shape(leaf: Any) -> str:
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
