"""Memories of very many rows on a mesh: tokens travel to the rows that they picked, and what comes back are sums.

A layer whose tokens pick single rows (product-key memories) has no plan that would be worth sorting: a row is smaller than the
bookkeeping of its exchange. So each device sees the tokens of all devices along axis `expert`, adds up what its own rows give, and the
sums are scattered back. Shards along `fsdp` are gathered first, as everywhere.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from moejax.dispatch.expert_parallel.hops import AXIS
from moejax.dispatch.expert_parallel.parameters import Entering, pad_experts
from moejax.dispatch.expert_parallel.tokens import pad_axis
from moejax.parallel.mesh import BATCH_AXES, batch_ways, shard_map
from moejax.parallel.scope import current

Rows = Mapping[str, Array]


def sum_rows(
    function: Callable[[Rows, Array, Array, Array], Array],
    rows: Rows,
    axes: Mapping[str, tuple[str | None, ...]],
    x: Float[Array, "n d"],
    index: Int[Array, "n p"],
    weight: Float[Array, "n p"],
) -> Float[Array, "n f"]:
    """`function(rows, x, index, weight)`, on one device or over the mesh that is traced for.

    Args:
      function: a sum over each token's picks in which a pick of weight 0 counts nothing.
      rows: arrays with the rows first.
      axes: logical axis names of each, 'expert' first.
      x: tokens.
      index: picked rows.
      weight: of each pick.
    """
    parallel = current()
    if parallel is None or parallel.mesh.size == 1:
        return function(rows, x, index, weight)
    shards = parallel.mesh.shape[AXIS]
    entering, rows = Entering(parallel.mesh, dict(axes), summed=None), pad_experts(dict(rows), shards)
    specs = entering.specs(rows)

    def device(rows: Rows, x: Array, index: Array, weight: Array) -> Array:
        rows = entering.gather(rows, specs, False, jnp.float32)
        if shards == 1:
            return function(rows, x, index, weight)
        x, index, weight = (jax.lax.all_gather(a, AXIS, tiled=True) for a in (x, index, weight))
        held = jax.tree.leaves(rows)[0].shape[0]
        index = index - held * jax.lax.axis_index(AXIS)
        own = (index >= 0) & (index < held)
        y = function(rows, x, jnp.where(own, index, 0), jnp.where(own, weight, 0))
        return jax.lax.psum_scatter(y, AXIS, tiled=True)

    return by_device(device, rows, specs, x, index, weight)


def by_device(function: Callable[..., Any], params: Any, specs: Any, *tokens: Array) -> Any:
    """`function(params, *tokens)` token by token, on one device or with each device of the mesh computing its own share of them.

    For what the partitioner cannot cut: kernels, loops over tokens, sorting.

    Args:
      params: enter as `specs` say.
      tokens: arrays that lead with tokens; they are padded to equal shares.
    """
    parallel = current()
    if parallel is None or parallel.mesh.size == 1:
        return function(params, *tokens)
    n, batch = tokens[0].shape[0], PartitionSpec(BATCH_AXES)
    spread = shard_map(function, parallel.mesh, in_specs=(specs, *(batch for _ in tokens)), out_specs=batch)
    y = spread(params, *(pad_axis(a, 0, n - n % -batch_ways(parallel.mesh)) for a in tokens))
    return jax.tree.map(lambda a: a[:n], y)
