"""What passes from layer to layer beside the tokens' vectors: values that travel through depth, and parameters that all layers share.

Any module or rule inside a block declares what it wants, and the stack provides it, scanned, unrolled or rematerialised:

    def carries(self, b, s): return {"recurrent": jnp.zeros((b, s, 32))}               # name -> the value before the first layer
    def shares(self, width): return {"recurrent": {"w": (init, (32, 96), (None, None))}}  # name -> one set of parameters

and in its `__call__`

    h = ctx.recall("recurrent", self.carries(b, s)["recurrent"])    # what an earlier layer left
    ctx.remember("recurrent", h)                                    # what the next one will find
    w = shared(self, ctx, "recurrent", self.shares(d))["w"]

Layers that declare one name mean one thing. Outside a stack the value starts anew and the parameters are the layer's own.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import flax.linen as nn
import jax
from jaxtyping import Array

from moejax.core.errors import ConfigError
from moejax.core.params import Initializer, param

# A parameter: initializer, shape, logical axis names.
Declared: TypeAlias = tuple[Initializer, tuple[int, ...], tuple[str | None, ...]]


class Carried:
    """Named pytrees of arrays `[b, s, ...]`: a box that lives while one block runs.

    The stack fills it before the block and empties it after, so nothing but arrays crosses a scan or a rematerialisation.
    Structure, shapes and dtypes never change.
    """

    def __init__(self, values: Mapping[str, Any]):
        self.values = dict(values)

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def __setitem__(self, name: str, value: Any) -> None:
        if name not in self.values:
            raise ConfigError(
                f"a layer remembers '{name}', which no layer's carries() declares; the next layer would not find it"
            )
        self.values[name] = jax.tree.map(lambda new, old: new.astype(old.dtype), value, self.values[name])

    def view(self, take: Callable[[Array], Array], put: Callable[[Array, Array], Array] | None) -> "Carried":
        """The carried of rearranged tokens: reads give `take(value)`, writes leave `put(new, old)`."""
        return _View(self, take, put)


class _View(Carried):
    def __init__(self, carried: Carried, take: Callable[[Array], Array], put: Callable[[Array, Array], Array] | None):
        self.carried, self.take, self.put = carried, take, put

    def __getitem__(self, name: str) -> Any:
        return jax.tree.map(self.take, self.carried[name])

    def __setitem__(self, name: str, value: Any) -> None:
        if self.put is None:
            raise ConfigError(f"a layer remembers '{name}' of tokens that cannot be put back; give map_tokens its `put`")
        self.carried[name] = jax.tree.map(self.put, value, self.carried[name])


def shared(module: nn.Module, ctx: Any, name: str, declared: Mapping[str, Mapping[str, Declared]]) -> dict[str, Array]:
    """The parameters `name`: those of all layers of the stack, or `module`'s own outside of one."""
    if ctx.shared is not None and name in ctx.shared:
        return dict(ctx.shared[name])
    return {key: param(module, key, *one) for key, one in declared[name].items()}


class Shared(nn.Module):
    """Declares the parameters that the layers of a stack share."""

    @nn.compact
    def __call__(self, declared: Mapping[str, Mapping[str, Declared]]) -> dict[str, dict[str, Array]]:
        return {
            name: {key: param(self, f"{name}_{key}", *one) for key, one in parameters.items()}
            for name, parameters in declared.items()
        }


def carried_by(parts: Iterable[Any], b: int, s: int) -> dict[str, Any]:
    """What all parts together carry, before the first layer.

    Raises:
      ConfigError: two parts carry one name in two shapes.
    """
    found: dict[str, Any] = {}
    for part in parts:
        if hasattr(part.value, "carries"):
            for name, value in part.value.carries(b, s).items():
                _check_same(
                    part.where, "carries", name, jax.tree.map(_shape, value), jax.tree.map(_shape, found.get(name, value))
                )
                found[name] = value
    return found


def shared_by(parts: Iterable[Any], width: int) -> dict[str, Mapping[str, Declared]]:
    """What all parts together share.

    Raises:
      ConfigError: two parts share one name in two shapes.
    """
    found: dict[str, Mapping[str, Declared]] = {}
    for part in parts:
        if hasattr(part.value, "shares"):
            for name, declared in part.value.shares(width).items():
                shapes = ({key: one[1] for key, one in item.items()} for item in (declared, found.get(name, declared)))
                _check_same(part.where, "shares", name, *shapes)
                found[name] = declared
    return found


def _shape(value: Array) -> tuple[tuple[int, ...], str]:
    return value.shape[2:], str(value.dtype)


def _check_same(where: str, verb: str, name: str, one: Any, other: Any) -> None:
    if one != other:
        raise ConfigError(f"{where} {verb} '{name}' as {one}, but another layer as {other}; give all layers the same settings")
