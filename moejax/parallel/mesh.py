"""Meshes: `'data=2,expert=4'` to `jax.sharding.Mesh`. The one module that knows JAX's axis types and `shard_map`.

Every mesh has all four axes, those that are not named with size 1, so that no code asks which are there:

| axis   | what it splits                                                                          |
|--------|-----------------------------------------------------------------------------------------|
| data   | the batch; parameters are copied                                                         |
| fsdp   | the batch, and parameters along `embed`; they are gathered where they are used           |
| expert | the batch, and the experts; tokens travel to their experts                               |
| tensor | heads, hidden widths and the vocabulary of one layer; the batch is copied                |
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from moejax.errors import ConfigError, nearest

MESH_AXES = ("data", "fsdp", "expert", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")  # those that split the batch


def parse_mesh(spec: str) -> dict[str, int]:
    """`'data=2,expert=4'` as `{'data': 2, 'expert': 4}`; at most one size may be -1: whatever devices are left.

    Raises:
      ConfigError: an unknown or repeated axis, or a size that is not a whole number.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, (p.strip() for p in spec.split(","))):
        name, _, size = (p.strip() for p in part.partition("="))
        if name not in MESH_AXES:
            raise ConfigError(f"mesh='{spec}': unknown axis '{name}'{nearest(name, MESH_AXES)}")
        if name in sizes:
            raise ConfigError(f"mesh='{spec}' names axis '{name}' twice")
        if not ((size.isdigit() and int(size) > 0) or size == "-1"):
            raise ConfigError(
                f"mesh='{spec}': {name}='{size}' is not a number of devices; write {name}=2, or {name}=-1 for the rest"
            )
        sizes[name] = int(size)
    if list(sizes.values()).count(-1) > 1:
        raise ConfigError(f"mesh='{spec}' leaves more than one size open; give all sizes but one")
    return sizes


def make_mesh(spec: str, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The mesh of a spec, over all devices unless given.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = parse_mesh(spec)
    known = math.prod(size for size in sizes.values() if size > 0)
    sizes = {name: len(devices) // known if size == -1 else size for name, size in sizes.items()}
    if math.prod(sizes.values()) != len(devices):
        raise ConfigError(
            f"mesh='{spec}' needs {known} devices{' or a multiple' if -1 in parse_mesh(spec).values() else ''}, and there are "
            f"{len(devices)}; change a size, or leave one open with -1"
        )
    shape = tuple(sizes.get(name, 1) for name in MESH_AXES)
    kinds = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)
    return jax.sharding.Mesh(np.asarray(devices).reshape(shape), MESH_AXES, axis_types=kinds)


def shard_map(function: Callable[..., Any], mesh: jax.sharding.Mesh, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`jax.shard_map` over all axes of the mesh, without the check of replication, which Pallas calls do not pass."""
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
