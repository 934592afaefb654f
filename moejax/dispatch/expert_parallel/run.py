"""Which exchange a plan takes over a mesh, and running it."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.core.errors import ConfigError
from moejax.dispatch.expert_parallel.exchanges import (
    Devices,
    Sizes,
    choose_exchange,
    count_hosts,
)
from moejax.dispatch.expert_parallel.merging import run_merge
from moejax.dispatch.expert_parallel.parameters import pad_experts
from moejax.dispatch.expert_parallel.slots import run_slots
from moejax.dispatch.expert_parallel.tokens import Split, run_tokens
from moejax.dispatch.experts import Experts
from moejax.parallel.scope import Parallel, current
from moejax.routing.plan import ExpertPlan, MergePlan, Plan, SlotPlan, TokenPlan


def expert_parallel(plan: Plan, experts: Experts, x: Float[Array, "g n d"]) -> Float[Array, "g n f"]:
    """Executes a plan over the mesh that is traced for; of token choice, one within the exchange's bound (`limit`).

    Raises:
      ConfigError: no mesh, or an exchange that cannot do this.
    """
    parallel = current()
    if parallel is None:
        raise ConfigError(
            "backend='expert_parallel' needs a mesh: set mesh='expert=8', or trace within moejax.parallel.use(...)"
        )
    if parallel.mesh.shape["tensor"] > 1:
        experts = experts.folded()
    shards = parallel.mesh.shape["expert"]
    padded = math.ceil(experts.num_experts / shards) * shards
    experts = experts.replace(params=pad_experts(experts.params, shards), num_experts=padded)
    if isinstance(plan, MergePlan):
        return run_merge(plan, x, experts, parallel)
    kind, sizes, _ = _exchange_of(plan, parallel)
    if kind == "capacity":
        return run_slots(plan, x, experts, parallel)
    return run_tokens(plan, x, experts, kind, sizes, parallel)


def limit(plan: Plan, parallel: Parallel | None) -> Plan:
    """The plan without what the exchange's `bound` refuses: those choices are no longer used but dropped, in statistics too.

    On each device and for each shard of experts, the first choices in the order of the batch are kept, so that no token's place
    depends on later ones of its device. The same in training and evaluation.
    """
    if parallel is None or parallel.exchange.bound is None or not isinstance(plan, TokenPlan):
        return plan
    kind, sizes, split = _exchange_of(plan, parallel)
    if kind == "capacity" or sizes.shards == 1:
        return plan
    g, n, k = plan.expert.shape
    shard = jnp.where(plan.used, plan.expert // sizes.experts_per_shard, -1)
    shard = split.apart(shard.reshape(g * n, k) + 1).reshape(-1, split.chunk * k) - 1
    chosen = shard[..., None] == jnp.arange(sizes.shards)
    kept = (chosen & (jnp.cumsum(chosen, axis=1) <= sizes.most_rows)).any(-1)
    kept = split.together(kept.reshape(split.parts, -1, k)).reshape(g, n, k)
    return plan.replace(used=plan.used & kept, dropped=plan.dropped | (plan.used & ~kept))


def _exchange_of(plan: TokenPlan | ExpertPlan | SlotPlan, parallel: Parallel) -> tuple[str, Sizes, Split]:
    """Which exchange runs, on which sizes."""
    if isinstance(plan, TokenPlan):
        g, n, k = plan.expert.shape
    elif isinstance(plan, ExpertPlan):
        g, n, k = plan.token.shape[0], plan.num_tokens, 1
    else:
        g, n, k = *plan.dispatch.shape[:2], 1
    shards = parallel.mesh.shape["expert"]
    split = Split.of(g * n, parallel)
    along = parallel.mesh.devices[0, 0, :, 0]
    hosts = parallel.exchange.hosts or count_hosts([device.process_index for device in along])
    if shards % hosts:
        raise ConfigError(f"exchange.hosts={hosts} does not divide mesh axis expert={shards}; the axis is cut into equal hosts")
    devices = Devices(parallel.mesh.size, along[0].platform, along[0].device_kind)
    padded = math.ceil(plan.num_experts / shards) * shards
    sizes = Sizes(split.chunk, k, padded, shards, hosts, parallel.exchange.bound)
    local_groups = g // split.parts if g % split.parts == 0 else 0
    return choose_exchange(plan, parallel.exchange.kind, devices, sizes, local_groups), sizes, split
