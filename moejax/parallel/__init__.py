"""Meshes, sharding rules, and programs that run on many devices and hosts."""

from moejax.parallel.mesh import MESH_AXES, PRESETS, make_mesh, parse_mesh, shard_map
from moejax.parallel.scope import Exchange, Parallel, constrain, current, for_use, make_parallel, use

__all__ = [
    "MESH_AXES", "PRESETS", "Exchange", "Parallel", "constrain", "current", "for_use", "make_mesh", "make_parallel", "parse_mesh", "shard_map", "use",
]  # fmt: skip
