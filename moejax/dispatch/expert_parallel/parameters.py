"""Experts' parameters on entry to `shard_map`: split as they are stored, gathered where the device needs more than it stores."""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from moejax.dispatch.expert_parallel.hops import AXIS
from moejax.parallel.rules import RULES


@dataclasses.dataclass(frozen=True)
class Entering:
    """How the parameters of experts enter.

    Attributes:
      mesh: where to.
      axes: pytree like the parameters: logical axis names of each, experts first. None: nothing but the experts is split.
      summed: the axis that the experts' outputs are sums over, piece by piece; None if there is none. See `Experts`.
    """

    mesh: Mesh
    axes: Any
    summed: str | None

    def split(self, params: Any) -> bool:
        """Whether each device along `tensor` computes a piece of every expert; otherwise it computes whole experts for its own tokens."""
        tensor = self.mesh.shape["tensor"]
        if self.axes is None or tensor == 1 or RULES.get(self.summed or "") != "tensor":
            return False
        return all(p.shape[axes.index(self.summed)] % tensor == 0 for p, axes in self._leaves(params) if self.summed in axes)

    def specs(self, params: Any) -> Any:
        """The parameters as they are stored."""
        return jax.tree.unflatten(
            jax.tree.structure(params), [PartitionSpec(*self._stored(p.shape, axes)) for p, axes in self._leaves(params)]
        )

    def gather(self, params: Any, specs: Any, split: bool, dtype: Any, experts: bool = False) -> Any:
        """Inside `shard_map`: this device's experts (or all `experts`), whole or its piece of each.

        What travels does so in the rows' dtype, in which it is used. Its derivative is a reduce-scatter.
        """

        def whole(p: Array, spec: PartitionSpec, axes: tuple[str | None, ...]) -> Array:
            for dim, name in enumerate(spec):
                if name is None or self.mesh.shape[name] == 1 or (name == AXIS and not experts):
                    continue
                if split and axes[dim] == self.summed:
                    continue
                narrow = jnp.issubdtype(p.dtype, jnp.floating) and p.dtype.itemsize > jnp.dtype(dtype).itemsize
                p = _all_gather(p.astype(dtype) if narrow else p, name, dim, torus_ways(self.mesh, name))
            if split and self.summed not in axes:
                # A term of the sum that has no pieces: one device adds it.
                p = jnp.where(jax.lax.axis_index("tensor") == 0, p, jnp.zeros_like(p))
            return p

        leaves, structure = jax.tree.flatten(params)
        flat_specs = jax.tree.leaves(specs, is_leaf=lambda s: isinstance(s, PartitionSpec))
        names = [axes for _, axes in self._leaves(params)]
        with jax.named_scope("bank"):  # by which reports of a compiled program call what travels here
            return jax.tree.unflatten(structure, [whole(*each) for each in zip(leaves, flat_specs, names, strict=True)])

    def _leaves(self, params: Any) -> list[tuple[Array, tuple[str | None, ...]]]:
        leaves, structure = jax.tree.flatten(params)
        if self.axes is None:
            return [(p, ("expert",) + (None,) * (p.ndim - 1)) for p in leaves]
        return list(zip(leaves, structure.flatten_up_to(self.axes), strict=True))

    def _stored(self, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> list[str | None]:
        """Mesh axes by the rules; a dimension that its axis does not divide is stored whole."""
        stored: list[str | None] = [AXIS]
        for size, axis in zip(shape[1:], axes[1:], strict=True):
            name = RULES.get(axis or "")
            fits = name is not None and name not in stored and self.mesh.shape[name] > 1 and size % self.mesh.shape[name] == 0
            stored.append(name if fits else None)
        return stored


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _all_gather(p: Array, name: str, dim: int, ways: tuple[int, ...]) -> Array:
    """The pieces along mesh axis `name`, one after another in dimension `dim`.

    XLA for TPU makes an all-reduce, twice the bytes and a whole gradient of memory, of a reduce-scatter along the last dimension,
    and of one whose devices lie along several dimensions of the torus. So the derivative brings the pieces to the front, and
    sums along one dimension of the torus after the other.
    """
    return jax.lax.all_gather(p, name, axis=dim, tiled=True)


def _scatter_sums(name: str, dim: int, ways: tuple[int, ...], _: None, dp: Array) -> tuple[Array]:
    size = math.prod(ways)
    pieces = jnp.moveaxis(dp.reshape(*dp.shape[:dim], size, -1, *dp.shape[dim + 1 :]), dim, 0)
    pieces = pieces.reshape(*ways, *pieces.shape[1:])
    devices = np.arange(size).reshape(ways)
    for i, way in enumerate(ways):
        lines = np.moveaxis(devices, i, -1).reshape(-1, way).tolist() if len(ways) > 1 else None
        pieces = jax.lax.psum_scatter(pieces, name, scatter_dimension=0, axis_index_groups=lines)
    return (pieces,)


_all_gather.defvjp(lambda p, name, dim, ways: (_all_gather(p, name, dim, ways), None), _scatter_sums)


def torus_ways(mesh: Mesh, name: str) -> tuple[int, ...]:
    """How the devices of mesh axis `name` fill the torus, line by line: the length of its lines in each dimension, slowest first.

    The axis's size alone where devices have no coordinates (anything but TPU), or do not lie in such an order.
    """
    size = mesh.shape[name]
    devices = np.moveaxis(mesh.devices, mesh.axis_names.index(name), -1).reshape(-1, size)
    if not hasattr(devices[0, 0], "coords"):
        return (size,)
    found = []  # (how many devices apart the coordinate changes, how many values it takes)
    for values in np.array([[device.coords for device in line] for line in devices]).transpose(2, 0, 1):
        changed = np.flatnonzero((values != values[:, :1]).any(0))
        if len(changed):
            apart, many = int(changed[0]), len(np.unique(values[0]))
            cycle = np.arange(size) // apart % many
            if (values != values[:, ::apart][:, :many][:, cycle]).any():
                return (size,)
            found.append((apart, many))
    found.sort(reverse=True)
    ways = tuple(many for _, many in found)
    aligned = all(apart == math.prod(ways[i + 1 :]) for i, (apart, _) in enumerate(found))
    return ways if aligned and math.prod(ways) == size else (size,)


def pad_experts(params: Any, shards: int) -> Any:
    """Experts that nobody chooses, so that each shard has as many."""
    return jax.tree.map(lambda p: jnp.pad(p, ((0, -p.shape[0] % shards), *((0, 0),) * (p.ndim - 1))), params)
