"""Backends: ways of executing a plan on experts, on one device or under automatic sharding. All agree with `reference` in value and gradient.

| backend   | what it does                                                  | cost beyond the active FLOPs              |
|-----------|---------------------------------------------------------------|-------------------------------------------|
| reference | every expert on every token: the oracle                        | e / k times the FLOPs                     |
| einsum    | one-hot matrices move tokens to slots (GShard, V-MoE)          | 2 n e c d FLOPs per group; needs slots    |
| capacity  | indices move tokens to slots, then a batched matmul            | empty slots; drops; needs slots           |
| grouped   | rows sorted by expert, no slot and no drop                     | a sort of row indices, ragged tiles       |
| gather    | every row gathers its own expert's parameters                  | reads one expert per row                  |
| merged    | averages the experts' parameters per group, then runs one      | builds one expert per group               |
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from moejax.dispatch.experts import Experts
from moejax.dispatch.layout import Batched, Grouped, Merged, PerToken
from moejax.routing.plan import ExpertPlan, MergePlan, Plan, SlotPlan, TokenPlan, sort_by_expert
from pallas_kernels.permute import permute, unpermute


def reference(plan: Plan, experts: Experts, x: Float[Array, "g n d"]) -> Float[Array, "g n f"]:
    """Every expert on every token (slot, merged expert), then the weighted sum that the plan defines."""
    g, n, d = x.shape
    if isinstance(plan, MergePlan):
        # The definition: one group at a time, its own merged experts.
        return jnp.concatenate([experts.run(x[i : i + 1], Merged(plan.weight[i : i + 1])) for i in range(g)])
    if isinstance(plan, SlotPlan):
        rows = jnp.stack([jnp.einsum("gns,gnd->gsd", plan.dispatch[:, :, i], x) for i in range(plan.num_experts)])
        s = rows.shape[2]
        y = experts.run(rows.reshape(plan.num_experts, g * s, d), Batched()).reshape(plan.num_experts, g, s, -1)
        return sum(jnp.einsum("gns,gsf->gnf", plan.combine[:, :, i], y[i]) for i in range(plan.num_experts))
    # An expert gets zeros for the tokens that it is not to see: whatever it makes of them counts nothing.
    seen = (plan.assigned() > 0).reshape(g * n, plan.num_experts).T
    rows = jnp.where(seen[..., None], x.reshape(1, g * n, d), 0)
    y = experts.run(rows, Batched()).reshape(plan.num_experts, g, n, -1)
    return jnp.einsum("gne,egnf->gnf", plan.dense().astype(y.dtype), y)


def einsum(plan: TokenPlan | ExpertPlan | SlotPlan, experts: Experts, x: Float[Array, "g n d"]) -> Float[Array, "g n f"]:
    """Matrices move tokens into slots and back: what SPMD partitioners like best, quadratic in the group size."""
    if isinstance(plan, TokenPlan):
        plan = plan.to_slots()
    soft = plan if isinstance(plan, SlotPlan) else plan.to_soft()
    g, n, e, s = soft.dispatch.shape
    rows = jnp.einsum("gnes,gnd->egsd", soft.dispatch.astype(x.dtype), x)
    y = experts.run(rows.reshape(e, g * s, -1), Batched()).reshape(e, g, s, -1)
    return jnp.einsum("gnes,egsf->gnf", soft.combine.astype(y.dtype), y)


def capacity(plan: TokenPlan | ExpertPlan, experts: Experts, x: Float[Array, "g n d"]) -> Float[Array, "g n f"]:
    """Indices move tokens into `[e, g * c]` slots and back."""
    slots = plan.to_slots() if isinstance(plan, TokenPlan) else plan
    g, e, c = slots.token.shape
    rows = gather_tokens(slots, x).swapaxes(0, 1).reshape(e, g * c, -1)
    y = experts.run(rows, Batched()).reshape(e, g, c, -1).swapaxes(0, 1)
    return scatter_tokens(slots, y)


def grouped(plan: TokenPlan | ExpertPlan, experts: Experts, x: Float[Array, "g n d"]) -> Float[Array, "g n f"]:
    """Rows sorted by expert; unused rows go last and are never multiplied."""
    g, n, d = x.shape
    entries = plan.entries()
    key = jnp.where(entries.used, entries.expert, plan.num_experts)
    order, inverse, group_sizes = sort_by_expert(key, plan.num_experts)
    layout = Grouped(group_sizes, num_rows=order.shape[0])
    weight = jnp.where(entries.used, entries.weight, 0)
    flat = x.reshape(g * n, d)
    if isinstance(plan, TokenPlan):
        k = plan.expert.shape[-1]
        y = unpermute(experts.run(permute(flat, order, inverse, k), layout), weight.reshape(g * n, k), order, inverse)
    else:
        y = _scatter_add(experts.run(flat[entries.token[order]], layout), entries.token[order], weight[order], g * n)
    return y.reshape(g, n, -1)


def gather(plan: TokenPlan | ExpertPlan, experts: Experts, x: Float[Array, "g n d"]) -> Float[Array, "g n f"]:
    """Each row with its own copy of its expert's parameters: fastest when rows or experts are tiny."""
    g, n, d = x.shape
    entries, flat = plan.entries(), x.reshape(g * n, d)
    weight = jnp.where(entries.used, entries.weight, 0)
    if isinstance(plan, TokenPlan):
        k = plan.expert.shape[-1]
        rows = jnp.where(entries.used[:, None], jnp.repeat(flat, k, axis=0), 0)
        y = experts.run(rows, PerToken(entries.expert))
        y = jnp.einsum("tk,tkf->tf", weight.reshape(g * n, k).astype(y.dtype), y.reshape(g * n, k, -1))
    else:
        y = experts.run(jnp.where(entries.used[:, None], flat[entries.token], 0), PerToken(entries.expert))
        y = _scatter_add(y, entries.token, weight, g * n)
    return y.reshape(g, n, -1)


def merged(plan: MergePlan, experts: Experts, x: Float[Array, "g n d"]) -> Float[Array, "g n f"]:
    """One expert per group, with averaged parameters."""
    return experts.run(x, Merged(plan.weight))


def gather_tokens(plan: ExpertPlan, x: Shaped[Array, "g n *d"]) -> Shaped[Array, "g e c *d"]:
    """The tokens that the experts chose; zeros in unused slots."""
    rows = jax.vmap(lambda tokens, index: tokens[index])(x, plan.token)
    return jnp.where(plan.used.reshape(*plan.used.shape, *(1,) * (x.ndim - 2)), rows, jnp.zeros((), x.dtype))


def scatter_tokens(plan: ExpertPlan, y: Float[Array, "g e c f"]) -> Float[Array, "g n f"]:
    """Sums slot outputs, weighted by the plan, back into their tokens. Unused slots count nothing, whatever they hold."""
    weight = jnp.where(plan.used, plan.weight, 0).astype(y.dtype)
    y = jnp.where(plan.used[..., None], y, 0) * weight[..., None]
    g, _, _, f = y.shape
    zeros = jnp.zeros((g, plan.num_tokens, f), y.dtype)
    return jax.vmap(lambda z, index, rows: z.at[index].add(rows))(zeros, plan.token.reshape(g, -1), y.reshape(g, -1, f))


def _scatter_add(rows: Float[Array, "m f"], token: Array, weight: Array, num_tokens: int) -> Float[Array, "t f"]:
    zeros = jnp.zeros((num_tokens, rows.shape[-1]), rows.dtype)
    return zeros.at[token].add(rows * weight[:, None].astype(rows.dtype))
