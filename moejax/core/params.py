"""Parameters: plain trees of arrays whose logical axis names are declared where they are made.

Axis names come from one vocabulary, `AXES`; `moejax.parallel` maps them to mesh axes. They are recorded while a model is
traced (`logical_axes`), so that parameter trees stay plain arrays with no boxes around them.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

AXES = frozenset({"batch", "seq", "embed", "mlp", "heads", "kv", "expert", "layers", "vocab", "rank"})

Path: TypeAlias = tuple[str, ...]
Names: TypeAlias = tuple[str | None, ...]
Initializer = Callable[..., Array]
# Of a module, the name of a parameter, its value, axes and role: the value to use.
Change: TypeAlias = Callable[[nn.Module, str, Array, Names, str | tuple[str, ...]], Array]


@dataclasses.dataclass(frozen=True)
class Declared:
    """What a parameter's declaration says: its axes, also where a mesh may not split them, and its roles (`moejax.core.roles`)."""

    axes: Names
    roles: tuple[str, ...] = ()


_recorder: ContextVar[dict[Path, Names] | None] = ContextVar("axes_recorder", default=None)
_declared: ContextVar[dict[Path, Declared] | None] = ContextVar("declared", default=None)
_changing: ContextVar[Change | None] = ContextVar("changing", default=None)
_placing: ContextVar[Callable[[Array, Names], Array] | None] = ContextVar("placing", default=None)
_whole: ContextVar[frozenset[str]] = ContextVar("whole_axes", default=frozenset())


def param(
    module: nn.Module,
    name: str,
    init: Initializer,
    shape: tuple[int, ...],
    axes: Names,
    dtype: Any = jnp.float32,
    role: str | tuple[str, ...] = (),
) -> Array:
    """Declares parameter `name` of `module` with one logical axis name (or None) per dimension.

    `role` says what it belongs to where the modules around it do not, see `moejax.core.roles`. It comes as it is used
    (`for_use`), but for stacks of experts, which dispatch gathers itself when it runs them.
    """
    split = _record(module, name, shape, axes, role)
    value = module.param(name, init, shape, dtype)
    value = value if "expert" in split else for_use(value, split)
    change = _changing.get()
    return value if change is None else change(module, name, value, axes, role)


class Dense(nn.Dense):
    """`nn.Dense` whose kernel `[in, out]` carries logical axis names; `role` as for `param`."""

    axes: tuple[str | None, str | None] = (None, None)
    role: str | tuple[str, ...] = ()

    def param(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """As `nn.Module.param`; a kernel or bias comes as it is used."""
        return for_use(super().param(name, *args, **kwargs), self.axes if name == "kernel" else self.axes[1:])

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        _record(self, "kernel", (inputs.shape[-1], self.features), self.axes, self.role)
        if self.use_bias:
            _record(self, "bias", (self.features,), self.axes[1:], self.role)
        return super().__call__(inputs)


def for_use(value: Array, axes: Names) -> Array:
    """A parameter as it is used: what `placing` was given makes of it; as it is on a single device."""
    place = _placing.get()
    return value if place is None else place(value, axes)


@contextlib.contextmanager
def placing(place: Callable[[Array, Names], Array]) -> Iterator[None]:
    """Parameters that are declared inside the `with` block come as `place(value, axes)`: gathered from the devices that store them."""
    token = _placing.set(place)
    try:
        yield
    finally:
        _placing.reset(token)


@contextlib.contextmanager
def changing(change: Change) -> Iterator[None]:
    """Parameters that `param` declares inside the `with` block come as `change(module, name, value, axes, role)`: with an adapter, say."""
    token = _changing.set(change)
    try:
        yield
    finally:
        _changing.reset(token)


def logical_axes(model: nn.Module, *args: Any, **kwargs: Any) -> dict[Path, Names]:
    """Parameter path -> logical axis names, found by tracing `model.init(key, *args, **kwargs)` without computing it.

    A parameter of a scanned layer has one more dimension than its names: its leading axis is `layers`.
    """
    with record_axes() as axes:
        jax.eval_shape(lambda key: model.init(key, *args, **kwargs), jax.random.key(0))
    return axes


@contextlib.contextmanager
def record_axes() -> Iterator[dict[Path, Names]]:
    """Collects the axis names, by which a mesh splits them, of the parameters that are declared inside the `with` block."""
    axes: dict[Path, Names] = {}
    token = _recorder.set(axes)
    try:
        yield axes
    finally:
        _recorder.reset(token)


@contextlib.contextmanager
def record_declared() -> Iterator[dict[Path, Declared]]:
    """Collects all that is said of the parameters that are declared inside the `with` block."""
    declared: dict[Path, Declared] = {}
    token = _declared.set(declared)
    try:
        yield declared
    finally:
        _declared.reset(token)


@contextlib.contextmanager
def whole(axis: str) -> Iterator[None]:
    """Parameters that are declared inside the `with` block are not split along `axis`: their names say None there.

    For experts that every token uses (shared experts, a dense layer as a bank of one): no token travels to them.
    """
    token = _whole.set(_whole.get() | {axis})
    try:
        yield
    finally:
        _whole.reset(token)


def splittable(axes: Names) -> Names:
    """The axes of a parameter that is declared here by which a mesh may split it, see `whole`."""
    return tuple(None if axis in _whole.get() else axis for axis in axes)


def per_expert(init: Initializer) -> Initializer:
    """An initializer for `[e, ...]` that draws each expert from its own key, folded from the expert's index.

    Expert i starts the same however many experts there are and however they are sharded, no two start alike, and fan-in is
    that of one expert, not of the stack. An initializer with a method `stacked(key, shape, dtype)` says itself how a stack starts.
    """
    if hasattr(init, "stacked"):
        return init.stacked

    def stacked(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(shape[0]))
        return jax.vmap(lambda k: init(k, shape[1:], dtype))(keys)

    return stacked


def _record(module: nn.Module, name: str, shape: tuple[int, ...], axes: Names, role: str | tuple[str, ...] = ()) -> Names:
    """Notes a declaration, for whoever listens; the axes by which a mesh may split the parameter."""
    split = splittable(axes)
    recorder, declared = _recorder.get(), _declared.get()
    if (recorder is not None or declared is not None) and (len(axes) != len(shape) or not {a for a in axes if a} <= AXES):
        raise ValueError(
            f"axes {axes} of {'/'.join((*module.path, name))} do not fit shape {shape}; valid names: {sorted(AXES)}"
        )
    if recorder is not None:
        recorder[(*module.path, name)] = split
    if declared is not None:
        declared[(*module.path, name)] = Declared(tuple(axes), (role,) if isinstance(role, str) else tuple(role))
    return split
