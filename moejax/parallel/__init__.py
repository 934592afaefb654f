"""Meshes, sharding rules, and programs that run on many devices and hosts."""

from moejax.parallel.mesh import MESH_AXES, make_mesh, shard_map
from moejax.parallel.scope import Exchange, Parallel, constrain, current, use

__all__ = ["MESH_AXES", "Exchange", "Parallel", "constrain", "current", "make_mesh", "shard_map", "use"]
