"""Trees of adapted models: adapters apart from the model they were trained on, together with it, or merged into it."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array

from moejax.core.errors import ConfigError
from moejax.layers.adapters.places import PREFIX, Named, Place, record_adapted
from moejax.layers.adapters.stack import LowRankSum

Tree = dict[str, Any]


def split_adapters(tree: Mapping[str, Any], *names: str) -> tuple[Tree, Tree]:
    """The tree without the adapters called `names` (without any, if none is given), and the tree of these adapters alone.

    Of parameters, of all variables, or of any tree like them. The second is what to save: kilobytes.
    """
    flat = flatten_dict(tree)
    ours = {path for path in flat if any(_is_adapter(part, names) for part in path)}
    parts = ({path: leaf for path, leaf in flat.items() if (path in ours) == which} for which in (False, True))
    return tuple(unflatten_dict(part) for part in parts)


def join_adapters(tree: Mapping[str, Any], adapters: Mapping[str, Any]) -> Tree:
    """The tree with adapters put beside what they adapt; the inverse of `split_adapters`.

    Raises:
      ConfigError: an adapter that is there already, or what is no adapter.
    """
    flat, added = flatten_dict(tree), flatten_dict(adapters)
    for path in added:
        if path in flat or not any(_is_adapter(part, ()) for part in path):
            what = "is there already" if path in flat else "is no adapter's parameter"
            raise ConfigError(f"{'/'.join(path)} {what}; join_adapters(model's tree, adapters' tree) takes what split gave")
    return unflatten_dict({**flat, **added})


def merge_adapters(model: nn.Module, params: Mapping[str, Any], *args: Any, names: tuple[str, ...] = (), **kwargs: Any) -> Tree:
    """The parameters with adapters folded into the matrices that they adapt: the model alone computes the same with them.

    Args:
      model: an adapted model.
      params: its parameters.
      *args: what the model is called with; shapes are enough.
      names: of the adapters to merge, whose own parameters are then gone; all of them if none are given.

    Raises:
      ConfigError: an adapter that has no matrix, because what it adds depends on the token.
    """
    flat = flatten_dict(params)
    chosen = [(named, place) for named, place in places(model, *args, **kwargs) if not names or named.name in names]
    if missing := set(names) - {named.name for named, _ in chosen}:
        raise ConfigError(
            f"there is no adapter '{missing.pop()}' to merge; there are: {', '.join(getattr(model, 'names', ()))}"
        )
    # As they are applied: what changes a matrix comes before what is added to it.
    for named, place in sorted(chosen, key=lambda item: not item[0].adapter.by_weight(item[1].form)):
        if place.param is None:
            raise ConfigError(f"adapter '{named.name}' sits around all of {place.path}, which is no matrix to merge it into")
        at, scope = (*place.module, place.param), place.scope(named)
        own = {path[len(scope) :]: leaf for path, leaf in flat.items() if path[: len(scope)] == scope}
        flat = {path: leaf for path, leaf in flat.items() if path[: len(scope)] != scope}
        flat[at] = _merged(named, place, flat[at], unflatten_dict(own))
    return unflatten_dict(flat)


def places(model: nn.Module, *args: Any, **kwargs: Any) -> list[tuple[Named, Place]]:
    """The adapters of a model and where they sit, found by tracing it."""
    with record_adapted() as found:
        shapes_of(model, *args, **kwargs)
    return found


def shapes_of(model: nn.Module, *args: Any, **kwargs: Any) -> Tree:
    """Shapes of a model's parameters, found by tracing `model.init(key, *args, **kwargs)` without computing it."""

    def init(key: Array) -> Tree:
        return model.init({"params": key, "router": key, "dropout": key}, *args, **kwargs)["params"]

    return jax.eval_shape(init, jax.random.key(0))


def _merged(named: Named, place: Place, value: Array, params: Tree) -> Array:
    """A matrix as it is stored, with an adapter in it. Layers of a scan come on leading axes."""
    form = "stack" if place.form == "stack" else "weight"

    def one(value: Array, params: Tree) -> Array:
        w = value if place.map is None else place.map.matrix(value)
        w = named.adapter.apply({"params": params}, form, w, place.site())
        w = w.dense() if isinstance(w, LowRankSum) else w
        return w if place.map is None else place.map.kernel(w)

    for _ in range(value.ndim - len(place.stored)):
        one = jax.vmap(one)
    return one(value, params).astype(value.dtype)


def _is_adapter(part: str, names: tuple[str, ...]) -> bool:
    return part.startswith(PREFIX) and (not names or part[len(PREFIX) :] in names)
