"""Merged experts on a mesh: parameters travel, or their sums do, and tokens stay where they are."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from moejax.dispatch.expert_parallel.hops import AXIS
from moejax.dispatch.expert_parallel.parameters import Entering
from moejax.dispatch.expert_parallel.tokens import pad_axis
from moejax.dispatch.experts import Experts
from moejax.dispatch.layout import Batched
from moejax.parallel.mesh import BATCH_AXES, MESH_AXES, batch_ways, shard_map
from moejax.parallel.scope import Parallel
from moejax.routing.plan import MergePlan


def run_merge(plan: MergePlan, x: Float[Array, "g n d"], experts: Experts, parallel: Parallel) -> Float[Array, "g n f"]:
    """One expert per group, merged for the device that holds the group; groups are padded to a multiple of the devices.

    With fewer groups than experts along axis `expert`, each device merges its own experts for all of these groups, and what travels is
    sums, one per group. Otherwise all experts travel, once, and each device merges them for its own groups.

    Args:
      experts: a multiple of the devices along `expert`.
    """
    g, mesh, tensor = x.shape[0], parallel.mesh, parallel.mesh.shape["tensor"]
    shards, padded = mesh.shape[AXIS], g - g % -batch_ways(mesh)
    entering = Entering(mesh, experts.axes, experts.summed)
    specs, pieces = entering.specs(experts.params), entering.split(experts.params)
    sums_travel = shards > 1 and padded // batch_ways(mesh) * shards < experts.num_experts

    def device(x: Array, weight: Array, params: Any, key: Array | None) -> Array:
        # Averages are taken in the parameters' own precision, so nothing is narrowed before.
        params = entering.gather(params, specs, pieces, jnp.float32, experts=not sums_travel)
        if key is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(MESH_AXES))
        if sums_travel:
            weight = jax.lax.all_to_all(weight, AXIS, split_axis=1, concat_axis=0, tiled=True)
        merged = jax.tree.map(lambda p: jnp.einsum("ge,e...->g...", weight, p), params)
        if sums_travel:
            merged = jax.tree.map(lambda p: jax.lax.psum_scatter(p, AXIS, tiled=True), merged)
        y = experts.replace(params=merged, key=key, num_experts=x.shape[0]).run(x, Batched())
        return jax.lax.psum(y, "tensor") if pieces and tensor > 1 else y

    weight = pad_axis(pad_axis(plan.weight, 1, experts.num_experts), 0, padded)
    batch = PartitionSpec(BATCH_AXES)
    spread = shard_map(device, mesh, in_specs=(batch, batch, specs, PartitionSpec()), out_specs=batch)
    return spread(pad_axis(x, 0, padded), weight, experts.params, experts.key)[:g]
