"""Which published tensor is which of our parameters: tables of names, read in both directions.

    Row("model.layers.{layer}.self_attn.q_proj.weight", "stack/{layer}/mixer/q/kernel", TRANSPOSE)
    Row("model.layers.{layer}.mlp.experts.{expert}.up_proj.weight", "stack/{layer}/ffn/bank/w_up", TRANSPOSE)

`{layer}` counts the layers of the stack that our path begins with, `{expert}` those along our leading expert axis. A row may name several
tensors and several parameters, whose change then takes and gives as many arrays.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from moejax.core.errors import ConfigError, nearest
from moejax.core.paths import listed
from moejax.models.stack import SCANNED, UNROLLED, block_name, pattern_blocks
from moejax.pretrained.store import Store

LAYER, EXPERT = "{layer}", "{expert}"

# Path of our parameter -> its shape; spelt as in `moejax.surgery.base.spelt`: 'stack/...', and 'router_state/stack/...'.
Shapes: TypeAlias = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Change:
    """What makes a published tensor ours, and back; exact in both directions.

    Attributes:
      there: their arrays -> ours.
      back: ours -> theirs.
    """

    there: Callable[..., Any]
    back: Callable[..., Any]

    def then(self, other: "Change") -> "Change":
        """This one, and another one after it."""
        return Change(lambda x: other.there(self.there(x)), lambda x: self.back(other.back(x)))


SAME = Change(lambda x: x, lambda x: x)
TRANSPOSE = Change(lambda x: x.T, lambda x: x.T)
# A bank of one expert: a dense layer.
ALONE = Change(lambda x: x[None], lambda x: x[0])
ALONE_TRANSPOSE = TRANSPOSE.then(ALONE)


@dataclasses.dataclass(frozen=True)
class Row:
    """Published tensors, our parameters, and the change between them.

    Attributes:
      theirs: key or keys.
      ours: path or paths.
      change: there and back.
      blocks: names of the blocks whose layers have it; empty for all.
    """

    theirs: str | tuple[str, ...]
    ours: str | tuple[str, ...]
    change: Change = SAME
    blocks: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Link:
    """A row at one layer and expert: keys, and paths with the index at which each one's share begins."""

    theirs: tuple[str, ...]
    ours: tuple[tuple[str, tuple[int, ...]], ...]
    change: Change

    def there(self, arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
        """Ours, of theirs."""
        made = self.change.there(*arrays)
        return made if isinstance(made, tuple) else (made,)

    def back(self, arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
        """Theirs, of ours."""
        made = self.change.back(*arrays)
        return made if isinstance(made, tuple) else (made,)


def links(table: Sequence[Row], stacks: Mapping[str, Any], shapes: Shapes) -> list[Link]:
    """A table written out for one model.

    Args:
      table: its family's.
      stacks: our path of a stack -> the model or part of one that has its fields (`blocks`, `pattern`, `num_layers`, `scan`).
      shapes: of our parameters.

    Raises:
      ConfigError: a path that the model does not have, or a parameter that the table does not fill whole.
    """
    layers = {path: _layers(stack) for path, stack in stacks.items()}
    found = [link for row in table for link in _written_out(row, layers, shapes)]
    filled: dict[str, set[tuple[int, ...]]] = {}
    for path, index in (end for link in found for end in link.ours):
        if index in filled.setdefault(path, set()):
            raise AssertionError(f"the table fills {path}{list(index)} twice")
        filled[path].add(index)
    for path, shape in shapes.items():
        indices = filled.get(path, set())
        whole = int(np.prod(shape[: len(next(iter(indices), ()))]))
        if len(indices) != whole or not indices:
            raise ConfigError(f"{path} {list(shape)} is no parameter of this family: its table has no tensor for it")
    return found


def check(found: Sequence[Link], store: Store, shapes: Shapes, ignored: Callable[[str], bool]) -> None:
    """Refuses a store that is not this model, before anything is read.

    Raises:
      ConfigError: a tensor that is missing, left over or of another shape. Names the file and the tensor.
    """
    keys = set(store.names())
    used = {key for link in found for key in link.theirs}
    missing = [key for link in found for key in link.theirs if key not in keys]
    if missing:
        raise ConfigError(f"{store.place} lacks {listed(missing)} for this config{nearest(missing[0], keys)}")
    over = sorted(key for key in keys - used if not ignored(key))
    if over:
        raise ConfigError(f"{store.where(over[0])} has tensors that the model of its config has no place for: {listed(over)}")
    for link in found:
        sample = [np.broadcast_to(np.float32(0), store.shape(key)) for key in link.theirs]
        try:
            made = [array.shape for array in link.there(sample)]
        except (ValueError, IndexError):
            made = [()]
        wanted = [shapes[path][len(index) :] for path, index in link.ours]
        if made != wanted:
            theirs = ", ".join(f"'{key}' {list(store.shape(key))}" for key in link.theirs)
            ours = ", ".join(f"{path} {list(shape)}" for (path, _), shape in zip(link.ours, wanted, strict=True))
            raise ConfigError(f"{store.where(link.theirs[0])}: tensor {theirs} does not fit {ours} of the model of its config")


def _written_out(row: Row, layers: Mapping[str, list[tuple[str, str, tuple[int, ...]]]], shapes: Shapes) -> list[Link]:
    theirs = (row.theirs,) if isinstance(row.theirs, str) else row.theirs
    ours = (row.ours,) if isinstance(row.ours, str) else row.ours
    if LAYER not in ours[0]:
        return _of_experts(theirs, tuple((path, ()) for path in ours), row.change, shapes)
    stack = ours[0].partition(f"/{LAYER}")[0].removeprefix("router_state/")
    found = []
    for number, (block, place, index) in enumerate(layers[stack]):
        if not row.blocks or block in row.blocks:
            keys = tuple(key.replace(LAYER, str(number)) for key in theirs)
            found += _of_experts(keys, tuple((path.replace(LAYER, place), index) for path in ours), row.change, shapes)
    return found


def _of_experts(
    theirs: tuple[str, ...], ours: tuple[tuple[str, tuple[int, ...]], ...], change: Change, shapes: Shapes
) -> list[Link]:
    for path, _ in ours:
        if path not in shapes:
            raise ConfigError(f"the model has no parameter {path}, which its family has{nearest(path, shapes)}")
    if not any(EXPERT in key for key in theirs):
        return [Link(theirs, ours, change)]
    path, index = ours[0]
    experts = range(shapes[path][len(index)])
    return [
        Link(tuple(key.replace(EXPERT, str(e)) for key in theirs), tuple((path, (*index, e)) for path, index in ours), change)
        for e in experts
    ]


def _layers(stack: Any) -> list[tuple[str, str, tuple[int, ...]]]:
    """Of each layer: its block, the path of the block in the stack, and where its share lies in arrays of all repeats."""
    parts = pattern_blocks(stack)
    found = []
    for layer in range(stack.num_layers):
        repeat, i = divmod(layer, len(parts))
        name = block_name(i, parts[i].name)
        scanned = f"{SCANNED}/{name}", (repeat,)
        found.append((parts[i].name, *(scanned if stack.scan else (f"{UNROLLED}{repeat}/{name}", ()))))
    return found
