"""The path of a token, once for all routed layers: logits -> plan -> dispatch, with losses and statistics sown on the way."""

import flax.linen as nn
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from moejax import dispatch as dispatch_lib
from moejax.core.context import Context
from moejax.core.control import control
from moejax.core.errors import ConfigError
from moejax.core.sowing import sow
from moejax.dispatch.experts import AnyExperts
from moejax.parallel.mesh import BATCH_AXES, batch_ways, shard_map
from moejax.parallel.scope import current
from moejax.routing.losses.adaptive_l1 import AdaptiveLoss
from moejax.routing.losses.base import Loss, Routing
from moejax.routing.losses.base import losses as loss_registry
from moejax.routing.plan import Plan, TokenPlan
from moejax.routing.select import Select
from moejax.routing.stats import routing_stats

GROUPINGS = ("sequence", "batch", "position")


def plan_tokens(
    module: nn.Module,
    logits: Float[Array, "g n o"],
    select: Select,
    valid: Bool[Array, "g n"] | None,
    train: bool,
    bias: Float[Array, "e"] | None = None,
) -> tuple[Plan, Float[Array, "g n o"]]:
    """The plan of `select`, after the interventions in the module's 'overrides' collection.

    Overrides, each optional, for analysis and for changing routing at inference:
      logit_bias [o] or [g, n, o]: added to the logits.
      expert [g, n, k]: these experts instead of the selected ones; weights stay those of the router's scores for them
        under the rule's own normalisation when the rule is a `TopK`.

    In training, a rule that draws (`needs_key`) gets a key from the module's rng stream 'router'.

    Returns the plan and the logits it was made from.
    """
    if module.has_variable("overrides", "logit_bias"):
        logits = logits + module.get_variable("overrides", "logit_bias")
    if train and select.needs_key:
        # Drawn for all groups at once, so that no mesh changes what is drawn.
        plan = select(logits, valid, bias=bias, train=train, key=module.make_rng("router"))
    else:
        plan = _select(select, logits, valid, bias, train)
    if module.has_variable("overrides", "expert"):
        if not isinstance(plan, TokenPlan):
            raise ConfigError(f"overrides.expert in {'/'.join(module.path)} needs token choice, not {type(plan).__name__}")
        plan = select.weigh(logits, module.get_variable("overrides", "expert"), valid, train=train)
    return plan, logits


def _select(select: Select, logits: Array, valid: Array | None, bias: Array | None, train: bool) -> Plan:
    """The rule's plan. On a mesh each device plans the groups that it holds: XLA cannot cut kernels, nor every top-k, by itself."""
    parallel = current()
    if parallel is None or parallel.mesh.size == 1 or logits.shape[0] % batch_ways(parallel.mesh):
        return select(logits, valid, bias=bias, train=train)

    def plan_own(logits: Array, valid: Array | None, bias: Array | None) -> Plan:
        return select(logits, valid, bias=bias, train=train)

    groups = PartitionSpec(BATCH_AXES)
    own = shard_map(plan_own, parallel.mesh, in_specs=(groups, groups, PartitionSpec()), out_specs=groups)
    return own(logits, valid, bias)


def sow_routing(module: nn.Module, routing: Routing, losses: tuple[Loss, ...], **extra: Array) -> None:
    """Sows every loss, weighted, into 'losses', every statistic into 'stats', and logits, probabilities and plan into 'routing'."""
    sow_losses(module, routing, losses)
    for name, value in {**routing_stats(routing), **extra}.items():
        sow(module, "stats", name, value)
    sow(module, "routing", "logits", routing.logits)
    sow(module, "routing", "probs", routing.probs)
    sow(module, "routing", "plan", routing.plan)


def sow_losses(module: nn.Module, routing: Routing, losses: tuple[Loss, ...], scale: float | Float[Array, ""] = 1.0) -> None:
    """Sows every loss, times `scale`.

    A loss is named '<kind>_loss': NNX keeps the collections of a bridged layer in one namespace, where 'z' is a statistic. An
    adaptive one keeps its state in 'router_state'.
    """
    for loss in losses:
        kind = loss_registry.kind_of(loss)
        if isinstance(loss, AdaptiveLoss):
            state = module.variable("router_state", kind, loss.fresh_state).value
            control(module, kind, loss, loss.measure(routing))
            value = loss(routing, state)
        else:
            value = loss(routing)
        sow(module, "losses", f"{kind}_loss", scale * value)


def group_tokens(x: Float[Array, "b s d"], ctx: Context, by: str) -> tuple[Float[Array, "g n d"], Context]:
    """Tokens and context in the groups that compete for capacity: one 'sequence', the whole 'batch', or each 'position'.

    With 'position', tokens compete only with those of other sequences at the same position, so that rules which select over
    tokens (expert choice) do not see the future of their own sequence.
    """
    if by == "batch":
        flat = ctx.map_tokens(lambda a: a.reshape(1, -1, *a.shape[2:]), lambda new, old: new.reshape(old.shape))
        return x.reshape(1, -1, x.shape[-1]), flat
    if by == "position":
        return x.swapaxes(0, 1), ctx.map_tokens(lambda a: a.swapaxes(0, 1), lambda new, old: new.swapaxes(0, 1))
    return x, ctx


def ungroup_tokens(y: Float[Array, "g n f"], b: int, s: int, by: str) -> Float[Array, "b s f"]:
    """The inverse of `group_tokens`."""
    if by == "position":
        return y.swapaxes(0, 1)
    return y.reshape(b, s, y.shape[-1])


def run_plan(
    plan: Plan, experts: AnyExperts, x: Float[Array, "g n d"], backend: str, by: str = "sequence"
) -> tuple[Float[Array, "g n f"], Plan, Int[Array, ""]]:
    """Dispatch: its output, the plan that was executed (`dispatch.execute`), and the index of the backend that ran.

    Args:
      by: how `group_tokens` grouped the tokens. Groups of one position lie across the devices that a batch is split over, and
        a token's choices are the same in any order: a mesh executes them sequence by sequence.
    """
    name = dispatch_lib.choose(plan, x.shape[-1]) if backend == "auto" else backend
    if name == "expert_parallel" and by == "position" and isinstance(plan, TokenPlan):
        y, turned, name = dispatch_lib.execute(_turned(plan), experts, x.swapaxes(0, 1), backend)
        y = y.swapaxes(0, 1)
        plan = plan.replace(used=turned.used.swapaxes(0, 1), dropped=turned.dropped.swapaxes(0, 1))
    else:
        y, plan, name = dispatch_lib.execute(plan, experts, x, backend)
    return y, plan, jnp.asarray(dispatch_lib.backend_index(name), jnp.int32)


def _turned(plan: TokenPlan) -> TokenPlan:
    """Groups for tokens and tokens for groups; what capacity the groups had, they have used."""
    leaves = {name: getattr(plan, name).swapaxes(0, 1) for name in ("expert", "weight", "used", "dropped")}
    return plan.replace(**leaves, capacity=None, limit=None)
