"""Whether the machine can hold a run: asked before anything of it is made, and before the first step is taken."""

import math
from typing import Any

import jax

from moejax.core.errors import ConfigError
from moejax.core.machine import gigabytes, memory


def check_fits(size: float, what: str) -> None:
    """Refuses what needs more than a device's whole memory.

    Args:
      size: bytes on each device.
      what: needs them.

    Raises:
      ConfigError: naming both numbers.
    """
    there = device_memory()
    if size > there:
        raise ConfigError(
            f"{what} need{'s' if what.startswith('a ') else ''} {gigabytes(size)} on each device, which has {gigabytes(there)}; make the "
            "model or data.batch_size smaller, raise train.accumulation, or split it over more devices (mesh)"
        )


def device_memory() -> float:
    """Bytes of one device of this process. Devices of a CPU share the machine's memory."""
    device = jax.local_devices()[0]
    stats = (device.memory_stats() or {}) if device.platform != "cpu" else {}
    return stats.get("bytes_limit") or (memory() / jax.local_device_count() if device.platform == "cpu" else math.inf)


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
