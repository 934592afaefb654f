"""Meshes: `'data=2,expert=4'` or `'fsdp x ep'` to `jax.sharding.Mesh`. The one module that knows axis types and `shard_map`.

Every mesh has all four axes, those that are not named with size 1, so that no code asks which are there:

| axis   | preset | what it splits                                                                          |
|--------|--------|-----------------------------------------------------------------------------------------|
| data   | dp     | the batch; parameters are copied                                                         |
| fsdp   | fsdp   | the batch, and parameters along `embed`; they are gathered where they are used           |
| expert | ep     | the batch, and the experts; tokens travel to their experts                               |
| tensor | tp     | heads, hidden widths and the vocabulary of one layer; the batch is copied                |

A spec names axes (or presets), separated by commas or ` x `: `'data=2,expert=4'`, `'fsdp x ep'`, `'ep=4 x tp'`, `'dp'`, or
`'single'`. Axes without a size (or with -1) divide the devices that are left as evenly as they can be, those named first
getting the larger shares: on 8 devices `'fsdp x ep'` is `fsdp=4,expert=2`. A spec without sizes so fits any number of devices.

The axes lie in this order over the devices, so the devices of one tensor-parallel layer are neighbours, and TPUs' axes are
laid along their torus.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils

from moejax.core.errors import ConfigError, nearest

MESH_AXES = ("data", "fsdp", "expert", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")  # those that split the batch
PRESETS = {"dp": "data", "fsdp": "fsdp", "ep": "expert", "tp": "tensor"}
SINGLE = "single"


def parse_mesh(spec: str, num_devices: int) -> dict[str, int]:
    """The sizes of all four axes: `'expert=-1'` on 8 devices is `{'data': 1, 'fsdp': 1, 'expert': 8, 'tensor': 1}`.

    Raises:
      ConfigError: an unknown or repeated axis or preset, a size that is not a whole number, or sizes that do not multiply to
        the number of devices.
    """
    named = _sizes(spec)
    known = math.prod(size for size in named.values() if size > 0)
    rest, remainder = divmod(num_devices, known)
    named |= dict(zip(_open(named), _shares(rest, len(_open(named))), strict=True))
    if remainder or math.prod(named.values()) != num_devices:
        raise ConfigError(
            f"mesh='{spec}' needs {known} devices{' or a multiple' if _open(_sizes(spec)) else ''}, and there are "
            f"{num_devices}; change a size, or leave one out: its axis then takes the devices that are left"
        )
    return {axis: named.get(axis, 1) for axis in MESH_AXES}


def make_mesh(spec: str, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The mesh of a spec, over all devices of all processes unless given; `'single'` takes the first.

    Raises:
      ConfigError: as `parse_mesh`.
    """
    devices = jax.devices() if devices is None else list(devices)
    devices = devices[:1] if spec.strip() == SINGLE else devices
    shape = tuple(parse_mesh(spec, len(devices)).values())
    if devices[0].platform == "tpu":
        laid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        laid = np.asarray(devices).reshape(shape)
    return jax.sharding.Mesh(laid, MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(MESH_AXES))


def shard_map(function: Callable[..., Any], mesh: jax.sharding.Mesh, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`jax.shard_map` over all axes of the mesh, without the check of replication, which Pallas calls do not pass."""
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def batch_ways(mesh: jax.sharding.Mesh) -> int:
    """In how many parts the mesh splits a batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def describe(mesh: jax.sharding.Mesh) -> str:
    """The axes that split something: `'data=2,expert=4'`."""
    return ",".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or SINGLE


def _sizes(spec: str) -> dict[str, int]:
    """Axis -> size as a spec names them, -1 where it is open."""
    if spec.strip() == SINGLE:
        return {}
    names = {axis: axis for axis in MESH_AXES} | PRESETS
    sizes: dict[str, int] = {}
    for part in re.split(r",|\sx\s", spec):
        name, _, size = (p.strip() for p in part.partition("="))
        if name not in names:
            raise ConfigError(f"mesh='{spec}': unknown axis or preset '{name}'{nearest(name, [SINGLE, *names])}")
        if names[name] in sizes:
            raise ConfigError(f"mesh='{spec}' names axis '{names[name]}' twice")
        size = size if "=" in part else "-1"
        if not ((size.isdigit() and int(size) > 0) or size == "-1"):
            raise ConfigError(
                f"mesh='{spec}': {name}='{size}' is not a number of devices; write {name}=2, or {name} for what is left"
            )
        sizes[names[name]] = int(size)
    return sizes


def _open(sizes: dict[str, int]) -> list[str]:
    return [axis for axis, size in sizes.items() if size == -1]


def _shares(devices: int, parts: int) -> list[int]:
    """`devices` as a product of `parts` factors, as equal as its prime factors allow, largest first."""
    shares = [1] * parts
    if not parts:
        return shares
    factor = 2
    primes = []
    while devices > 1:
        while devices % factor == 0:
            primes.append(factor)
            devices //= factor
        factor += 1
    for prime in reversed(primes):
        smallest = shares.index(min(shares))
        shares[smallest] *= prime
    return sorted(shares, reverse=True)
