"""From the rows that each process reads to one batch over all devices."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from moejax.core.errors import ConfigError
from moejax.parallel.mesh import batch_ways, describe
from moejax.parallel.rules import batch_sharding


def data_shard(mesh: Mesh) -> tuple[int, int]:
    """Which part of every batch this process reads, and how many parts there are.

    Processes whose devices need the same rows (a tensor-parallel layer that spans them) read the same part. Part i holds the
    i-th block of a batch's rows, so the whole batch is the same for any number of processes wherever each process's devices
    are neighbours in the mesh.

    Raises:
      ConfigError: some processes share a part of their rows only.
    """
    ways = batch_ways(mesh)
    blocks: dict[int, set[int]] = {}
    for device, (rows, *_) in batch_sharding(mesh).devices_indices_map((ways,)).items():
        blocks.setdefault(device.process_index, set()).update(range(*rows.indices(ways)))
    parts = sorted({tuple(sorted(own)) for own in blocks.values()})
    if sum(map(len, parts)) != ways:
        raise ConfigError(
            f"mesh='{describe(mesh)}': some processes need rows of a batch that others need in part; take a size of the "
            f"tensor axis that divides, or is divided by, the {jax.local_device_count()} devices of a process"
        )
    return parts.index(tuple(sorted(blocks[jax.process_index()]))), len(parts)


def global_shapes(batch: Mapping[str, Any], parts: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the whole batch, from this process's part."""
    return {name: jax.ShapeDtypeStruct((x.shape[0] * parts, *x.shape[1:]), x.dtype) for name, x in batch.items()}


def to_global(batch: Mapping[str, np.ndarray], shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """The whole batch as arrays over all devices, of which this process gives its part.

    Args:
      batch: this process's rows.
      shapes: of the whole batch, with shardings (`Program.batch`).
    """
    return {
        name: jax.make_array_from_process_local_data(like.sharding, np.asarray(batch[name]), like.shape)
        for name, like in shapes.items()
    }
