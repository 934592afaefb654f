"""What a surgery is: a pure function from checkpoint to checkpoint, and what it may know of the model that it works for.

    @surgeries.register("halve")
    @dataclasses.dataclass(frozen=True)
    class Halve:
        paths: tuple[str, ...] = ("*",)

        def __call__(self, checkpoint: Checkpoint, target: Target) -> Checkpoint:
            return checkpoint.map(lambda path, x: x / 2 if any(matches(path, p) for p in self.paths) else x)

A config names surgeries in `init.surgeries`; see `moejax.train.starts` for what happens to their result.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import flax.traverse_util
from jaxtyping import Array

from moejax.core.params import Path
from moejax.core.registry import Registry

surgeries = Registry("surgery", "moejax.surgery")

Tree = Any
Leaves = dict[Path, Any]


class Checkpoint(NamedTuple):
    """A model: `(config, variables, meta)`. What `moejax.train.load` gives, and what surgeries take and give.

    Attributes:
      config: plain config of the run that it comes from.
      variables: `{'params': ..., 'router_state': ...}`, nested dicts of arrays.
      meta: what was noted beside it (seed, step, ...).
    """

    config: Mapping[str, Any]
    variables: Mapping[str, Any]
    meta: Mapping[str, Any] = {}

    @property
    def params(self) -> Tree:
        """The parameters alone."""
        return self.variables["params"]

    @property
    def leaves(self) -> Leaves:
        """All arrays by path, the collection's name first: `('params', 'stack', ...)`."""
        return flax.traverse_util.flatten_dict(dict(self.variables))

    def with_leaves(self, leaves: Mapping[Path, Any]) -> "Checkpoint":
        """A checkpoint like this one with other arrays."""
        return self._replace(variables={"params": {}, **flax.traverse_util.unflatten_dict(dict(leaves))})

    def map(self, f: Callable[[str, Any], Any]) -> "Checkpoint":
        """A checkpoint whose arrays are `f(path, array)`; for the path see `spelt`."""
        return self.with_leaves({path: f(spelt(path), x) for path, x in self.leaves.items()})


@dataclasses.dataclass(frozen=True)
class Target:
    """The model whose start is being made, as a surgery sees it.

    Attributes:
      config: plain config of the run that begins.
      shapes: its variables, as shapes and dtypes.
      parameters: a tree like its parameters, of `moejax.core.roles.Parameter`: axes ('layers', 'expert', ...) and roles.
      key: a random key; another one for each surgery of a run and each seed of it.
      others: the checkpoints of `init.others`, by name.
      fresh: `fresh(paths) -> {path: array}`: what these arrays (`Leaves`' paths) would be if the model began untrained.
      batches: `batches(count)`: the first batches of the run's training data, to calibrate with.
    """

    config: Mapping[str, Any]
    shapes: Tree
    parameters: Tree
    key: Array
    others: Mapping[str, Checkpoint]
    fresh: Callable[[Collection[Path]], Leaves]
    batches: Callable[[int], Sequence[Mapping[str, Any]]]

    @property
    def leaves(self) -> Leaves:
        """The shape of each of its arrays, by path."""
        return flax.traverse_util.flatten_dict(dict(self.shapes))


@runtime_checkable
class Surgery(Protocol):
    """A frozen dataclass whose fields are the keys of its config."""

    def __call__(self, checkpoint: Checkpoint, target: Target) -> Checkpoint:
        """The checkpoint after the operation. A pure function."""
        ...


def spelt(path: Path) -> str:
    """A path of `Leaves` as patterns see it: parameters without their collection's name, 'stack/...', and 'router_state/stack/...'."""
    return "/".join(path[1:] if path[0] == "params" else path)
