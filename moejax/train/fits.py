"""Whether the machine can hold a run: asked before anything of it is made, and before the first step is taken."""

import math
from typing import Any

import jax

from moejax.core.errors import ConfigError
from moejax.core.machine import gigabytes, memory
from moejax.parallel import Parallel


def check_fits(size: int | float, parallel: Parallel | None, what: str) -> None:
    """Refuses what needs more than a device's whole memory.

    Args:
      size: bytes on each device.
      parallel: the mesh; None for one device.
      what: needs them.

    Raises:
      ConfigError: naming both numbers.
    """
    there = _device_memory(1 if parallel is None else len(parallel.mesh.local_devices))
    if size > there:
        raise ConfigError(
            f"{what} need{'s' if what.startswith('a ') else ''} {gigabytes(size)} on each device, which has {gigabytes(there)}; make the "
            "model or data.batch_size smaller, raise train.accumulation, or split it over more devices (mesh)"
        )


def held(tree: Any) -> int:
    """Bytes of the arrays of a tree on each device: of arrays or of their shapes, split or not."""

    def own(x: Any) -> int:
        sharding = getattr(x, "sharding", None)
        shape = x.shape if sharding is None else sharding.shard_shape(x.shape)
        # Keys are arrays of words; they are small.
        return math.prod(shape) * getattr(x.dtype, "itemsize", 16)

    return sum(map(own, jax.tree.leaves(tree)))


def needed(compiled: Any) -> int:
    """Bytes on each device that a compiled program needs while it runs, as its compiler says; 0 where it does not."""
    found = compiled.memory_analysis()
    if found is None:
        return 0
    return found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes - found.alias_size_in_bytes


def _device_memory(devices: int) -> int | float:
    """Bytes of each of this process's `devices`; those of a CPU share the machine's memory. Infinity where nothing tells."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return memory() / devices
    return (device.memory_stats() or {}).get("bytes_limit") or math.inf
