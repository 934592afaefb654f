"""Sharding rules: which mesh axis splits which dimension of a parameter, of the state that follows it, and of a batch.

| logical axis              | mesh axis | where it does not divide |
|---------------------------|-----------|--------------------------|
| embed                     | fsdp      | an error                 |
| expert                    | expert    | an error                 |
| mlp, heads                | tensor    | an error                 |
| kv, vocab                 | tensor    | stays whole              |
| layers, rank, batch, seq  | none      |                          |

Sizes of a network are its author's to choose, so one that does not divide is an error that says which key to change. The
vocabulary (or the number of classes) belongs to the data, and few key-value heads are the point of sharing them: they stay
whole, with a warning, on every device. `kv` parameters are split by channels, so heads that are fewer than the devices are
no obstacle to them; attention then gathers keys and values. What has no logical names (norms, a model of plain Flax modules) is copied,
and so is everything that is small: keys, counters, router state.
"""

import itertools
import math
import warnings
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moejax.core.errors import ConfigError
from moejax.parallel.mesh import BATCH_AXES, batch_ways, describe

Tree = Any
Axes = Mapping[tuple[str, ...], tuple[str | None, ...]]

RULES = {"embed": "fsdp", "expert": "expert", "mlp": "tensor", "heads": "tensor", "kv": "tensor", "vocab": "tensor"}
MAY_STAY_WHOLE = ("kv", "vocab")

# Logical axis -> the key of a model's config that sets it.
_KEYS = {"embed": "d_model", "expert": "num_experts", "mlp": "hidden", "heads": "num_heads"}


class StaysWhole(UserWarning):
    """A dimension that a mesh axis was meant to split is copied, because its size does not divide."""


def param_specs(params: Tree, axes: Axes, mesh: Mesh, model: Mapping[str, Any] | None = None) -> Tree:
    """`PartitionSpec`s of parameters.

    Args:
      params: nested dict of arrays or shapes.
      axes: parameter path -> logical axis names, from `moejax.core.params.record_axes`. A parameter with more dimensions than names
        has been scanned over: its leading dimensions are layers.
      mesh: of all four axes.
      model: `config.model`, in which errors look for the key to change.

    Raises:
      ConfigError: a size that its mesh axis does not divide; names the key, both values and a value that would do.
    """
    uneven: set[tuple[str, int]] = set()

    def spec(path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
        names = tuple(str(key.key) for key in path)
        logical = axes.get(names, ())
        logical = (None,) * (len(leaf.shape) - len(logical)) + tuple(logical)
        taken: list[str | None] = []
        for dimension, (size, axis) in enumerate(zip(leaf.shape, logical, strict=True)):
            ways = RULES.get(axis or "")
            if ways is None or mesh.shape[ways] == 1 or ways in taken:
                taken.append(None)
            elif size % mesh.shape[ways] == 0:
                taken.append(ways)
            elif axis in MAY_STAY_WHOLE:
                uneven.add((axis, size))
                taken.append(None)
            else:
                raise _uneven(names, dimension, size, axis, ways, mesh, model)
        return _trimmed(taken)

    specs = jax.tree_util.tree_map_with_path(spec, params)
    for axis, size in sorted(uneven):
        warnings.warn(
            f"'{axis}' of size {size} stays whole on every device: tensor={mesh.shape['tensor']} does not divide it",
            StaysWhole,
            stacklevel=2,
        )
    return specs


def follow_params(tree: Tree, params: Tree, specs: Tree) -> Tree:
    """`PartitionSpec`s of state that mirrors parameters, such as an optimizer's.

    A leaf belongs to the parameter whose path its own path ends with. One of the parameter's shape (momentum) is split like
    it; one that lacks some of its dimensions, or has 1 there (factored second moments, norms per layer or per expert), is
    split like those it has. Anything else is copied.
    """
    by_path = {
        _names(path): (leaf.shape, spec)
        for (path, leaf), spec in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(specs, is_leaf=_is_spec), strict=True
        )
    }

    def spec(path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
        names = _names(path)
        for start in range(len(names)):
            if names[start:] in by_path:
                return _aligned(leaf.shape, *by_path[names[start:]])
        return PartitionSpec()

    return jax.tree_util.tree_map_with_path(spec, tree)


def shardings(specs: Tree, mesh: Mesh) -> Tree:
    """`NamedSharding`s of a tree of specs."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=_is_spec)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of every array of a batch: rows over the axes that split a batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch(rows: int, accumulation: int, mesh: Mesh) -> None:
    """Refuses a batch that the mesh cannot split evenly.

    Args:
      rows: of the whole batch, over all hosts.
      accumulation: microbatches; each is split over the whole mesh.

    Raises:
      ConfigError: with batch sizes that would do.
    """
    unit = batch_ways(mesh) * accumulation
    if rows % unit == 0:
        return
    split = " * ".join(f"{axis}={mesh.shape[axis]}" for axis in BATCH_AXES if mesh.shape[axis] > 1)
    parts = f" in {accumulation} microbatches (train.accumulation={accumulation})" if accumulation > 1 else ""
    raise ConfigError(
        f"data.batch_size={rows} does not divide among the {batch_ways(mesh)} parts ({split}) into which "
        f"mesh='{describe(mesh)}' splits a batch{parts}; take {' or '.join(map(str, _multiples(rows, unit)))}"
    )


def _uneven(
    path: tuple[str, ...], dimension: int, size: int, axis: str, ways: str, mesh: Mesh, model: Mapping[str, Any] | None
) -> ConfigError:
    parts = mesh.shape[ways]
    key, value = _find_key(path, _KEYS[axis], model)
    what = f"{key}={value}" if value is not None else f"'{axis}' of size {size}"
    of = f"(parameter {'/'.join(path)}, dimension {dimension} of size {size})"
    unit = parts // math.gcd(parts, size // value) if isinstance(value, int) and value and size % value == 0 else parts
    fits = " or ".join(map(str, _multiples(value or size, unit)))
    if axis == "expert" and size < parts:
        fewer = f"take at least {parts} experts, or fewer shards, such as mesh='data,expert={math.gcd(size, mesh.size)}'"
        return ConfigError(f"{what} is fewer than the {ways}={parts} shards of mesh='{describe(mesh)}' {of}; {fewer}")
    return ConfigError(
        f"{what} does not divide among {ways}={parts} of mesh='{describe(mesh)}' {of}; take {fits}, or another size of {ways}"
    )


def _find_key(path: tuple[str, ...], key: str, model: Mapping[str, Any] | None) -> tuple[str, Any]:
    """Dotted place and value of the key of a model's config that sets a parameter's size: the innermost on its way.

    A parameter's path follows the config, but for the stack's own levels, where `1_moe` is the block 'moe'.
    """
    if model is None:
        return key, None
    node: Any = model
    place, found = "model", (key, None)
    if key in node:
        found = (f"model.{key}", node[key])
    blocks = model.get("blocks") or {}
    for part in path:
        name = part.partition("_")[2]
        if node is model and name in blocks:
            node, place = blocks[name], f"model.blocks.{name}"
        elif isinstance(node, Mapping) and isinstance(node.get(part), Mapping):
            node, place = node[part], f"{place}.{part}"
        else:
            continue
        if key in node:
            found = (f"{place}.{key}", node[key])
    return found


def _aligned(shape: tuple[int, ...], of: tuple[int, ...], spec: PartitionSpec) -> PartitionSpec:
    """`spec` of an array of shape `of`, for an array that has some of its dimensions."""
    full = (*spec, *(None,) * (len(of) - len(spec)))
    for kept in itertools.combinations(range(len(of)), len(shape)):
        if all(size in (of[i], 1) for size, i in zip(shape, kept, strict=True)):
            return _trimmed([full[i] if size == of[i] else None for size, i in zip(shape, kept, strict=True)])
    return PartitionSpec()


def _trimmed(entries: list[str | None]) -> PartitionSpec:
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def _multiples(value: int, unit: int) -> list[int]:
    """The multiples of `unit` next to `value`."""
    below = value // unit * unit
    return [n for n in (below, below + unit) if n > 0]


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, PartitionSpec)
