"""The mesh that a program is traced for: set around the trace, read by whatever has to know how arrays are split."""

import contextlib
import dataclasses
from collections.abc import Iterator
from contextvars import ContextVar

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from moejax.core.errors import ConfigError
from moejax.core.fields import Count, Positive, checked
from moejax.core.params import placing
from moejax.parallel.mesh import BATCH_AXES, SINGLE, make_mesh

# Logical axis -> mesh axes, of activations. Parameters' rules are in rules.py.
_ACTIVATIONS = {
    "batch": BATCH_AXES,
    "heads": ("tensor",),
    "kv": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "expert": ("expert",),
}


@checked
@dataclasses.dataclass(frozen=True)
class Exchange:
    """How tokens travel to experts on other devices.

    Attributes:
      kind: 'auto', or a name of `moejax.dispatch.expert_parallel.EXCHANGES`.
      chunks: pieces that a device's tokens are cut into, so that one piece is exchanged while another is computed.
      bound: rows that one device may send to another, as a multiple of the mean; None for as many as there can be (dropless).
      hosts: equal parts of the expert axis between which links are slow; None for as many hosts as its devices belong to.
    """

    kind: str = "auto"
    chunks: Count = 1
    bound: Positive | None = None
    hosts: Count | None = None


@dataclasses.dataclass(frozen=True)
class Parallel:
    """A mesh, and how tokens are exchanged over it. Hashable."""

    mesh: Mesh
    exchange: Exchange = Exchange()


def make_parallel(mesh: str | None, exchange: Exchange | None = None) -> Parallel | None:
    """`config.mesh` over all devices of all processes; None where one device computes everything.

    Raises:
      ConfigError: the spec is wrong, or leaves out devices of other processes.
    """
    made = make_mesh(mesh or SINGLE)
    if jax.process_count() > made.size:
        raise ConfigError(
            f"mesh='{mesh or SINGLE}' uses {made.size} device, and there are {jax.process_count()} processes; set config.mesh to "
            f"'dp' or another that uses them all"
        )
    return Parallel(made, exchange or Exchange()) if made.size > 1 else None


_current: ContextVar[Parallel | None] = ContextVar("parallel", default=None)


def current() -> Parallel | None:
    """What is being traced for; None on a single device."""
    return _current.get()


@contextlib.contextmanager
def use(parallel: Parallel | None) -> Iterator[None]:
    """Traces inside the `with` block are for this mesh."""
    token = _current.set(parallel)
    try:
        with placing(for_use):
            yield
    finally:
        _current.reset(token)


def for_use(x: Array, axes: tuple[str | None, ...]) -> Array:
    """A parameter, gathered over the axes that only store it in parts (`fsdp`). The identity without a mesh.

    Left to itself the partitioner may prefer to move activations, which are larger.
    """
    parallel = current()
    if parallel is None or parallel.mesh.shape["fsdp"] == 1:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(parallel.mesh, activation_spec(parallel.mesh, x.shape, axes)))


def constrain(x: Array, *axes: str | None) -> Array:
    """`x`, split by the rules for activations: one logical axis name (or None) per dimension. The identity without a mesh.

    A dimension that its mesh axes do not divide stays whole.
    """
    parallel = current()
    if parallel is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(parallel.mesh, activation_spec(parallel.mesh, x.shape, axes)))


def activation_spec(mesh: Mesh, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> PartitionSpec:
    """Mesh axes of each dimension of an activation."""
    entries: list[tuple[str, ...] | None] = []
    for size, axis in zip(shape, axes, strict=True):
        names = tuple(name for name in _ACTIVATIONS.get(axis or "", ()) if mesh.shape[name] > 1)
        ways = 1
        for name in names:
            ways *= mesh.shape[name]
        entries.append(names if names and size % ways == 0 else None)
    return PartitionSpec(*entries)
