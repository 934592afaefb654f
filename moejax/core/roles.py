"""What a model says of its parameters, found by tracing it: the axes of each, and what part of the model it belongs to.

A role is declared where a parameter is made, and never guessed from the shape:

- by the module that owns it, or any module around that one: `role = "norms"` in the body of a user's class, the registry of a class
  of the library (`Registry(..., role="routers")`), Flax's own norms and embeddings;
- by the parameter itself: `param(self, "position", ..., role="embeddings")`, `Dense(..., role="head")`;
- experts are what is stacked along the axis 'expert'; biases what is called one.

A parameter has all roles of the modules around it: the router of a LoRA mixture is one of the adapters and one of the routers.
"""

import contextlib
import dataclasses
import fnmatch
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax

from moejax.core.params import Declared, Names, Path, record_axes, record_declared

ROLES = ("adapters", "biases", "embeddings", "experts", "ffns", "head", "mixers", "norms", "routers")

BIASES = ("bias", "b", "b_*", "*_bias")
_FLAX = {
    nn.Embed: ("embeddings",),
    nn.LayerNorm: ("norms",),
    nn.RMSNorm: ("norms",),
    nn.GroupNorm: ("norms",),
    nn.BatchNorm: ("norms",),
    nn.InstanceNorm: ("norms",),
}

Tree = Any


@dataclasses.dataclass(frozen=True)
class Parameter:
    """What is known of a parameter besides its numbers. A leaf of a tree like that of the parameters.

    Attributes:
      path: names from the root of the model, `('stack', 'repeats', '0_dense', ...)`.
      shape: of the whole array.
      axes: a logical name, or None, for each dimension; 'layers' for those that a scan over layers put in front. Experts that
        every token uses are stacked along 'expert' here too, although no mesh splits them.
      roles: what it belongs to, see the module.
    """

    path: Path
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    roles: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """The path as one word, `stack/repeats/0_dense/...`."""
        return "/".join(self.path)


class Notes:
    """What was seen while a model was traced.

    Attributes:
      axes: parameter path -> logical axis names by which a mesh splits it.
    """

    def __init__(self, axes: dict[Path, Names], declared: dict[Path, Declared]):
        self.axes = axes
        self._declared = declared
        self._roles: dict[Path, set[str]] = defaultdict(set)
        self._ranks: dict[Path, int] = {}

    def describe(self, params: Tree) -> Tree:
        """The tree of `params`, arrays or shapes, with a `Parameter` in the place of each."""
        return jax.tree_util.tree_map_with_path(lambda keys, leaf: self._parameter(names(keys), leaf.shape), params)

    def see(self, module: nn.Module) -> None:
        """Notes the roles of a bound module, and how many dimensions its own parameters have where they are made."""
        self._roles[module.path].update(roles_of(module))
        for name, value in module.variables.get("params", {}).items():
            if hasattr(value, "ndim"):
                self._ranks[(*module.path, name)] = value.ndim

    def roles(self, path: Path) -> set[str]:
        """The roles of the modules around a path, of a parameter or of state."""
        return {role for i in range(len(path)) for role in self._roles.get(path[:i], ())}

    def _parameter(self, path: Path, shape: tuple[int, ...]) -> Parameter:
        said = self._declared.get(path) or Declared((None,) * self._ranks.get(path, len(shape)))
        found = {*said.roles, *self.roles(path)}
        if "expert" in self.axes.get(path, ()):
            found.add("experts")
        if any(fnmatch.fnmatchcase(path[-1], pattern) for pattern in BIASES):
            found.add("biases")
        return Parameter(path, tuple(shape), ("layers",) * (len(shape) - len(said.axes)) + said.axes, frozenset(found))


@contextlib.contextmanager
def record() -> Iterator[Notes]:
    """Notes on the model that is traced inside the `with` block (`jax.eval_shape` of its `init`)."""
    with record_axes() as axes, record_declared() as declared:
        notes = Notes(axes, declared)

        def note(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
            result = call(*args, **kwargs)
            # Models ask questions of parts that belong to no model yet; and `nn.remat` of a function calls it as if it were a method of
            # the modules that it is given, which then seem to lie at the top.
            if context.module.scope is not None and hasattr(type(context.module), context.method_name):
                notes.see(context.module)
            return result

        with nn.intercept_methods(note):
            yield notes


def describe(model: nn.Module, *args: Any, **kwargs: Any) -> Tree:
    """A tree like the model's parameters, of `Parameter`s; traces `model.init(key, *args, **kwargs)` and computes nothing."""
    with record() as notes:
        shapes = jax.eval_shape(lambda key: model.init(key, *args, **kwargs), jax.random.key(0))
    return notes.describe(shapes["params"])


def names(keys: tuple[Any, ...]) -> Path:
    """A path of JAX's as names."""
    return tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in keys)


def roles_of(module: nn.Module) -> tuple[str, ...]:
    """The roles that a module declares for all parameters in it."""
    said = getattr(module, "role", ())
    said = (said,) if isinstance(said, str) else said if isinstance(said, tuple) else ()
    return said or next((roles for cls, roles in _FLAX.items() if isinstance(module, cls)), ())
