"""Published models in and out.

    import moejax as mj
    found = mj.pretrained.load("smollm2-135m")                       # or a folder of safetensors, or a GGUF file
    model = mj.models.build(found.model)
    logits = model.apply(found.variables, tokens)
    mj.pretrained.save(found, "smollm2")                             # a folder that transformers loads

Every tensor of the file is used, and every parameter of the model filled, or the conversion raises. Arrays are made one parameter at a
time, on a mesh one device's share at a time, from one tensor at a time: no more than the model and one of these is ever in memory.
"""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np
from jax.sharding import Mesh

from moejax.core.errors import ConfigError
from moejax.core.files import digest, write_json
from moejax.core.params import record_axes
from moejax.models.registry import build
from moejax.parallel.rules import param_specs, replicated, shardings
from moejax.pretrained.family import Family, families
from moejax.pretrained.names import find
from moejax.pretrained.opening import CONFIG, open_model
from moejax.pretrained.safetensors_files import SHARD_BYTES, SINGLE, write_safetensors
from moejax.pretrained.store import Store
from moejax.pretrained.table import Link, check, links

_STATE = "router_state"


class Pretrained(NamedTuple):
    """A published model in our words.

    Attributes:
      family: transformers' `model_type`.
      model: `config.model`, plain.
      variables: `{'params': ...}`, and 'router_state' if it has any.
    """

    family: str
    model: Mapping[str, Any]
    variables: Mapping[str, Any]


def config_of(name: str) -> dict[str, Any]:
    """`config.model` of a published model: of its name, its folder, or its GGUF file. Reads no tensor.

    `max_length` is the context that it was trained for, and the size of the caches; generation is quicker with a smaller one.

    Raises:
      ConfigError: as `load`.
    """
    opened = open_model(name)
    return opened.family.model(opened.settings)


def load(name: str, mesh: Mesh | None = None) -> Pretrained:
    """A published model: NumPy arrays, or on a mesh arrays that each device has its share of.

    Args:
      name: of a model in `moejax.pretrained.names.MODELS`, a folder with config.json and safetensors, or a GGUF file.
      mesh: of all four axes, see `moejax.parallel.make_mesh`.

    Raises:
      ConfigError: an unknown family, or a config that the library does not compute; a file that is damaged, or tensors that are missing,
        left over or of another shape. Names the file and the tensor.
    """
    opened = open_model(name)
    family, model = opened.family, opened.family.model(opened.settings)
    store = _Named(opened.store, family)
    network = build(model)
    shapes, axes = trace(network, family)
    found = links(family.table(model), family.stacks(network), {path: leaf.shape for path, leaf in shapes.items()})
    copies = {key: of for key, of in family.copies(model).items() if key in store.names()}
    check(found, store, {path: leaf.shape for path, leaf in shapes.items()}, lambda key: key in copies or family.ignores(key))
    for key, of in copies.items():
        if not np.array_equal(store.read(key), store.read(of)):
            raise ConfigError(f"{store.where(key)}: '{key}' differs from '{of}', which the config says are one")
    places = dict.fromkeys(shapes) if mesh is None else _placed(shapes, axes, mesh, model)
    ends = by_path(found)
    arrays = {path: make(ends[path], store, leaf, places[path]) for path, leaf in shapes.items()}
    return Pretrained(opened.model_type, model, tree(arrays))


def save(pretrained: Pretrained, folder: str | Path, dtype: Any = np.float32, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes a model as transformers loads it: config.json and safetensors, in shards of at most `shard_bytes`.

    Args:
      pretrained: the family to write it as, its `config.model` and its variables, on this machine or on a mesh.
      folder: where to; made if need be.
      dtype: of the tensors, 'bfloat16' for half the size. A config says float32, whatever the tensors are; transformers converts them.
      shard_bytes: of a file.

    Raises:
      ConfigError: variables that are not those of the model, or a model that the family does not have.
    """
    family = families[pretrained.family]()
    settings = family.settings(pretrained.model)
    network = build(pretrained.model)
    shapes, _ = trace(network, family)
    wanted = {path: leaf.shape for path, leaf in shapes.items()}
    arrays = flat(pretrained.variables)
    for path in sorted({*arrays, *wanted}):
        if path not in arrays or path not in wanted or arrays[path].shape != wanted[path]:
            said, needs = (str(list(x[path].shape)) if path in x else "nothing" for x in (arrays, shapes))
            raise ConfigError(f"{path} is {said} in the variables, and {needs} in the model of the config")
    found = links(family.table(pretrained.model), family.stacks(network), wanted)
    target = Path(folder)
    write(target, found, arrays, dtype, shard_bytes)
    write_json(target / CONFIG, settings, indent=2)


def write(
    folder: Path, found: list[Link], arrays: Mapping[str, Any], dtype: Any, shard_bytes: int = SHARD_BYTES, name: str = SINGLE
) -> None:
    """Writes arrays, by path, as the tensors that the links say they are; one at a time."""
    sources = {key: (link, i) for link in found for i, key in enumerate(link.theirs)}

    def theirs(link: Link, part: Callable[[str, tuple[int, ...]], np.ndarray]) -> tuple[np.ndarray, ...]:
        return link.back([part(path, index) for path, index in link.ours])

    def shape(key: str) -> tuple[int, ...]:
        link, i = sources[key]
        return theirs(link, lambda path, index: np.broadcast_to(np.float32(0), arrays[path].shape[len(index) :]))[i].shape

    def read(key: str) -> np.ndarray:
        link, i = sources[key]
        return theirs(link, lambda path, index: np.asarray(arrays[path][index]))[i]

    write_safetensors(folder, {key: (np.dtype(dtype), shape(key)) for key in sources}, read, shard_bytes, name)


def contents(name: str) -> str:
    """Names what is in the files of a model: a hash, of the tensors and the config."""
    path = find(name)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors")) + [path / CONFIG]
    digests = " ".join(f"{file.name} {digest(file)}" for file in files if file.is_file())
    return hashlib.sha256(digests.encode()).hexdigest()[:20]


class _Named(Store):
    """A store under the keys of the family's table."""

    def __init__(self, store: Store, family: Family):
        self.place, self._store = store.place, store
        self._names = {family.key(key): key for key in store.names()}

    def names(self) -> tuple[str, ...]:
        return tuple(self._names)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._store.shape(self._names[key])

    def where(self, key: str) -> str:
        return self._store.where(self._names[key])

    def read(self, key: str) -> np.ndarray:
        return self._store.read(self._names[key])


# Index of an array's share -> the link that fills it, and which of the link's arrays it is.
_Ends = dict[tuple[int, ...], tuple[Link, int]]


def by_path(found: list[Link]) -> dict[str, _Ends]:
    """What each parameter is filled by."""
    ends: dict[str, _Ends] = {}
    for link in found:
        for i, (path, index) in enumerate(link.ours):
            ends.setdefault(path, {})[index] = link, i
    return ends


def make(ends: _Ends, store: Store, leaf: jax.ShapeDtypeStruct, place: jax.sharding.Sharding | None) -> Any:
    """A parameter: whole, or each device's share by itself."""

    def share(slices: tuple[slice, ...]) -> np.ndarray:
        ranges = [range(*s.indices(n)) for s, n in zip(slices, leaf.shape, strict=True)]
        out = np.empty([len(r) for r in ranges], leaf.dtype)
        for index, (link, i) in ends.items():
            if all(at in r for at, r in zip(index, ranges, strict=False)):
                value = link.there([store.read(key) for key in link.theirs])[i]
                here = tuple(at - r.start for at, r in zip(index, ranges, strict=False))
                out[here] = value[slices[len(index) :]]
        return out

    if place is None:
        return share((slice(None),) * len(leaf.shape))
    return jax.make_array_from_callback(leaf.shape, place, share)


def trace(network: nn.Module, family: Family) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[tuple[str, ...], Any]]:
    """The shape of every parameter and of the router state, by path, and the axes of parameters."""
    with record_axes() as axes:
        shapes = jax.eval_shape(lambda key: network.init(key, *family.example(network)), jax.random.key(0))
    return flat({name: shapes[name] for name in ("params", _STATE) if name in shapes}), axes


def _placed(
    shapes: Mapping[str, Any], axes: Mapping[tuple[str, ...], Any], mesh: Mesh, model: Mapping[str, Any]
) -> dict[str, jax.sharding.Sharding]:
    shaped = tree(shapes)
    placed = {"params": shardings(param_specs(shaped["params"], axes, mesh, model), mesh)}
    if _STATE in shaped:
        placed[_STATE] = jax.tree.map(lambda _: replicated(mesh), shaped[_STATE])
    return flat(placed)


def flat(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves by path; parameters without their collection's name."""
    found = flax.traverse_util.flatten_dict(dict(variables))
    return {"/".join(path[1:] if path[0] == "params" else path): leaf for path, leaf in found.items()}


def tree(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flat`."""
    paths = {path: tuple(path.split("/")) for path in leaves}
    return flax.traverse_util.unflatten_dict(
        {names if names[0] == _STATE else ("params", *names): leaves[path] for path, names in paths.items()}
    )
