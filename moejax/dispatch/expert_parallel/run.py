"""Which exchange a plan takes over a mesh, and running it."""

import math
from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

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
from moejax.dispatch.expert_parallel.tokens import Call, Split, run_tokens
from moejax.dispatch.layout import Expert, Layout
from moejax.parallel.scope import Parallel, current
from moejax.routing.plan import ExpertPlan, MergePlan, Plan, SlotPlan, TokenPlan


def expert_parallel(plan: Plan, bank: Any, x: Float[Array, "g n d"]) -> Float[Array, "g n f"]:
    """Executes a plan over the mesh that is traced for.

    Raises:
      ConfigError: no mesh, an exchange that cannot do this, or a bank that computes outside `layout.map`.
    """
    parallel = current()
    if parallel is None:
        raise ConfigError(
            "backend='expert_parallel' needs a mesh: set mesh='expert=8', or trace within moejax.parallel.use(...)"
        )
    return bank(x, Spread(limit(plan, parallel), parallel))


def limit(plan: Plan, parallel: Parallel | None) -> Plan:
    """The plan without what the exchange's `bound` refuses: those choices are no longer used but dropped, in statistics too.

    On each device and for each shard of experts, the first choices in the order of the batch are kept, so that no token's place
    depends on later ones of its device. The same in training and evaluation. Limiting twice changes nothing.
    """
    if parallel is None or parallel.exchange.bound is None or not isinstance(plan, TokenPlan):
        return plan
    kind, sizes, split = _exchange_of(plan, parallel, plan.num_experts)
    if kind == "capacity" or sizes.shards == 1:
        return plan
    g, n, k = plan.expert.shape
    shard = jnp.where(plan.used, plan.expert // sizes.experts_per_shard, -1)
    shard = split.apart(shard.reshape(g * n, k) + 1).reshape(-1, split.chunk * k) - 1
    chosen = shard[..., None] == jnp.arange(sizes.shards)
    kept = (chosen & (jnp.cumsum(chosen, axis=1) <= sizes.most_rows)).any(-1)
    kept = split.together(kept.reshape(split.parts, -1, k)).reshape(g, n, k)
    return plan.replace(used=plan.used & kept, dropped=plan.dropped | (plan.used & ~kept))


@struct.dataclass
class Spread(Layout):
    """Tokens of a plan, spread over a mesh. A bank gives its whole expert to `map`, whose result is the combined output."""

    plan: Plan
    parallel: Parallel = struct.field(pytree_node=False)

    def map(
        self,
        expert: Expert,
        params: Any,
        x: Float[Array, "g n d"],
        axes: Any = None,
        summed: str | None = None,
        key: Array | None = None,
    ) -> Float[Array, "g n f"]:
        if isinstance(self.plan, MergePlan):
            shards = self.parallel.mesh.shape["expert"]
            call = Call(expert, pad_experts(params, shards), axes, summed, key)
            return run_merge(self.plan, x, call, math.ceil(self.plan.num_experts / shards) * shards, self.parallel)
        kind, sizes, _ = _exchange_of(self.plan, self.parallel, self.plan.num_experts)
        call = Call(expert, pad_experts(params, sizes.shards), axes, summed, key)
        if kind == "capacity":
            return run_slots(self.plan, x, call, sizes.experts, self.parallel)
        return run_tokens(self.plan, x, call, kind, sizes, self.parallel)

    def dot(self, x: Array, w: Array) -> Array:
        raise ConfigError(_NOT_MAPPED)

    def take(self, b: Array) -> Array:
        raise ConfigError(_NOT_MAPPED)

    def tied(self, slots: Int[Array, "e"], num_stored: int) -> "Spread":
        if not isinstance(self.plan, TokenPlan):
            raise ConfigError(
                f"a bank whose experts share parameters cannot execute a {type(self.plan).__name__} plan with "
                "backend='expert_parallel'; use backend='einsum'"
            )
        if self.parallel.exchange.bound is not None:
            raise ConfigError(
                f"exchange.bound={self.parallel.exchange.bound} counts rows by the plan's experts, and this bank's share parameters; "
                "set exchange.bound=None"
            )
        return self.replace(plan=self.plan.replace(expert=slots[self.plan.expert], num_experts=num_stored))


_NOT_MAPPED = (
    "this bank calls layout.dot or layout.take directly, and backend='expert_parallel' must run it on other devices: hand the whole "
    "expert to layout.map(expert, params, x), or set another backend"
)


def _exchange_of(plan: TokenPlan | ExpertPlan | SlotPlan, parallel: Parallel, experts: int) -> tuple[str, Sizes, Split]:
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
    padded = math.ceil(experts / shards) * shards
    sizes = Sizes(split.chunk, k, padded, shards, hosts, parallel.exchange.bound)
    local_groups = g // split.parts if g % split.parts == 0 else 0
    return choose_exchange(plan, parallel.exchange.kind, devices, sizes, local_groups), sizes, split
