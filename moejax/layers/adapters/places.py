"""Where adapters may sit: the layers of a model by path, form and role, and which of them an adapter's targets name."""

import contextlib
import dataclasses
import fnmatch
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from moejax.core.paths import matches
from moejax.core.roles import ROLES
from moejax.layers.adapters.base import Adapter, Site
from moejax.layers.adapters.maps import LinearMap

# Adapters' parameters lie in a scope of this name, and the adapter's, beside what they change.
PREFIX = "adapter_"
ROUTERS = "routers"
KIND = "kind:"  # before a target that is a kind of layer


@dataclasses.dataclass(frozen=True)
class Named:
    """An adapter and its name. Flax does not look into it, so that the adapter gets parameters only through its copies."""

    name: str
    adapter: Adapter

    @property
    def scope(self) -> str:
        """Name of the scope of its parameters."""
        return f"{PREFIX}{self.name}"


@dataclasses.dataclass(frozen=True, eq=False)
class Place:
    """A layer, or a matrix, that adapters can change.

    Attributes:
      path: in the model, as in its tree of parameters.
      form: how it is changed: the method of an adapter.
      kind: of layer; see `Site`.
      roles: what it is for; some of `moejax.core.roles.ROLES`.
      module: path of the module that holds it, in the tree of parameters.
      param: name of the matrix in that module; None for a layer that is none.
      shape, axes, map, table: see `Site`.
      below: where in an adapter's scope its parameters for this place lie: several matrices of one module are apart.
    """

    path: str
    form: str
    kind: str
    roles: frozenset[str]
    module: tuple[str, ...]
    param: str | None = None
    shape: tuple[int, ...] = ()
    axes: tuple[str | None, ...] = ()
    map: LinearMap | None = None
    below: tuple[str, ...] = ()
    table: bool = False

    @property
    def stored(self) -> tuple[int, ...]:
        """Shape of the matrix as one layer stores it."""
        return self.shape if self.map is None else self.map.stored

    def scope(self, named: Named) -> tuple[str, ...]:
        """Path of an adapter's parameters here."""
        return (*self.module, named.scope, *self.below)

    def targeted(self, target: str) -> bool:
        """Whether a target names this place: a role, a kind of layer, or a pattern of its path.

        A pattern that stands for something around a matrix stands for the matrix. A role stands for routers only if it is theirs.
        """
        if target in ROLES:
            return target in self.roles and (target == ROUTERS or ROUTERS not in self.roles)
        if target.startswith(KIND):
            return target == f"{KIND}{self.kind}"
        return fnmatch.fnmatchcase(self.path, target) if self.param is None else matches(self.path, target)

    def site(self, **live: Any) -> Site:
        """The place, as an adapter sees it."""
        return Site(self.path, self.kind, self.shape, self.axes, self.table, map=self.map, **live)


_recorder: ContextVar[list[tuple[Named, Place]] | None] = ContextVar("adapted", default=None)


@contextlib.contextmanager
def record_adapted() -> Iterator[list[tuple[Named, Place]]]:
    """Collects the adapters of the models that are traced inside the `with` block, with their places."""
    found: list[tuple[Named, Place]] = []
    token = _recorder.set(found)
    try:
        yield found
    finally:
        _recorder.reset(token)


def note(named: Named, place: Place) -> None:
    """Tells `record_adapted` of an adapter at a place; layers are traced more than once."""
    recorder = _recorder.get()
    if recorder is not None and not any((other.name, at.path) == (named.name, place.path) for other, at in recorder):
        recorder.append((named, place))
