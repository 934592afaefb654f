"""Plans with slots on a mesh: every device fills the slots of its own tokens, and exchanges slots instead of tokens (GShard)."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from moejax.dispatch.backends import gather_tokens, scatter_tokens
from moejax.dispatch.expert_parallel.hops import AXIS
from moejax.dispatch.expert_parallel.parameters import Entering
from moejax.dispatch.expert_parallel.tokens import Split, pad_axis
from moejax.dispatch.experts import Experts
from moejax.dispatch.layout import Batched
from moejax.parallel.mesh import BATCH_AXES, MESH_AXES, shard_map
from moejax.parallel.scope import Parallel
from moejax.routing.plan import ExpertPlan, SlotPlan, TokenPlan

Slots = TypeVar("Slots", ExpertPlan, SlotPlan)


def run_slots(
    plan: TokenPlan | ExpertPlan | SlotPlan, x: Float[Array, "g n d"], experts: Experts, parallel: Parallel
) -> Float[Array, "g n f"]:
    """Executes a plan by an exchange of slots.

    A device fills the slots of the groups that it holds. Groups that lie across devices are seen as one group on each, of those
    of its tokens that were chosen: as many slots as there were, or as the device has tokens. Soft slots cannot be seen so;
    their groups are padded to a multiple of the devices. Devices along `tensor` hold the same tokens: each takes some of the slots.

    Args:
      experts: a multiple of the devices along `expert`.
    """
    g, n, d = x.shape
    mesh, split = parallel.mesh, Split.of(g * n, parallel)
    shards, tensor, chunks = mesh.shape[AXIS], mesh.shape["tensor"], parallel.exchange.chunks
    entering = Entering(mesh, experts.axes, experts.summed)
    specs, pieces = entering.specs(experts.params), entering.split(experts.params)
    across = g % split.parts != 0 and not isinstance(plan, SlotPlan)
    if across and isinstance(plan, TokenPlan):
        plan = plan.to_slots()

    def device(x: Array, plan: Any, params: Any, key: Array | None) -> Array:
        params = entering.gather(params, specs, pieces, x.dtype)
        if key is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(MESH_AXES))
        slots = _own(plan, split, x.shape[1]) if across else plan.to_slots() if isinstance(plan, TokenPlan) else plan
        y = 0
        for i, part in enumerate(_cut(slots, tensor, chunks)):
            rows = pad_axis(_fill(part, x), 0, experts.num_experts)
            rows = checkpoint_name(_to_experts(rows, shards), "exchanged")
            if pieces:
                rows = jax.lax.all_gather(rows, "tensor", axis=1, tiled=True)
            own = experts.replace(
                params=params,
                key=None if key is None else jax.random.fold_in(key, i),
                num_experts=experts.num_experts // shards,
            )
            ys = own.run(rows, Batched())
            if pieces:
                ys = jax.lax.psum_scatter(ys, "tensor", scatter_dimension=1, tiled=True)
            ys = checkpoint_name(_to_tokens(ys, shards), "exchanged")
            y = y + _empty(part, ys[: plan.num_experts])
        return jax.lax.psum(y, "tensor") if tensor > 1 else y

    batch = PartitionSpec(BATCH_AXES)
    if across:
        x = split.apart(x.reshape(g * n, d))
    else:
        padding = -g % split.parts
        plan, x = jax.tree.map(lambda a: pad_axis(a, 0, g + padding), (plan, x))
    in_specs = (batch, PartitionSpec() if across else batch, specs, PartitionSpec())
    y = shard_map(device, mesh, in_specs=in_specs, out_specs=batch)(x, plan, experts.params, experts.key)
    return split.together(y).reshape(g, n, -1) if across else y[:g]


def _own(plan: ExpertPlan, split: Split, tokens: int) -> ExpertPlan:
    """Of a plan of groups across devices, what this device's tokens have in it, as one group."""
    g, e, c = plan.token.shape
    start = split.each * jax.lax.axis_index(BATCH_AXES)
    token = plan.token + plan.num_tokens * jnp.arange(g, dtype=jnp.int32)[:, None, None] - start
    token, weight, used = (a.swapaxes(0, 1).reshape(e, g * c) for a in (token, plan.weight, plan.used))
    mine = used & (token >= 0) & (token < split.each)
    first = jnp.argsort(~mine, axis=1, stable=True)[:, : min(g * c, tokens)]
    token, weight, mine = (jnp.take_along_axis(a, first, 1)[None] for a in (token, weight, mine))
    return ExpertPlan(jnp.where(mine, token, 0), weight, mine, num_tokens=tokens)


def _cut(slots: Slots, tensor: int, chunks: int) -> list[Slots]:
    """The slots in chunks, of which this device along `tensor` takes its share. Slots that padding adds are empty."""

    def cut(a: Array) -> list[Array]:
        a = pad_axis(a, a.ndim - 1, -(-a.shape[-1] // (tensor * chunks)) * tensor * chunks)
        a = a.reshape(*a.shape[:-1], tensor, chunks, -1)
        mine = jax.lax.axis_index("tensor") if tensor > 1 else 0
        a = jax.lax.dynamic_index_in_dim(a, mine, a.ndim - 3, keepdims=False)
        return [a[..., i, :] for i in range(chunks)]

    leaves, structure = jax.tree.flatten(slots)
    return [jax.tree.unflatten(structure, each) for each in zip(*map(cut, leaves), strict=True)]


def _fill(slots: ExpertPlan | SlotPlan, x: Float[Array, "g n d"]) -> Float[Array, "e r d"]:
    """Rows of each expert, group by group."""
    if isinstance(slots, SlotPlan):
        rows = jnp.einsum("gnes,gnd->egsd", slots.dispatch.astype(x.dtype), x)
    else:
        rows = gather_tokens(slots, x).swapaxes(0, 1)
    return rows.reshape(rows.shape[0], -1, x.shape[-1])


def _empty(slots: ExpertPlan | SlotPlan, y: Float[Array, "e r f"]) -> Float[Array, "g n f"]:
    """The weighted sums of what the slots have become."""
    if isinstance(slots, SlotPlan):
        g, _, e, s = slots.combine.shape
        return jnp.einsum("gnes,egsf->gnf", slots.combine.astype(y.dtype), y.reshape(e, g, s, -1))
    g, e, c = slots.token.shape
    return scatter_tokens(slots, y.reshape(e, g, c, -1).swapaxes(0, 1))


def _to_experts(rows: Float[Array, "e r d"], shards: int) -> Float[Array, "e0 r0 d"]:
    return rows if shards == 1 else jax.lax.all_to_all(rows, AXIS, split_axis=0, concat_axis=1, tiled=True)


def _to_tokens(rows: Float[Array, "e0 r0 f"], shards: int) -> Float[Array, "e r f"]:
    return rows if shards == 1 else jax.lax.all_to_all(rows, AXIS, split_axis=1, concat_axis=0, tiled=True)
