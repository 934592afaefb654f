"""The path of a token, once for all routed layers: logits -> plan -> dispatch, with losses and statistics sown on the way."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from moejax import dispatch as dispatch_lib
from moejax.core.context import Context
from moejax.core.control import control
from moejax.core.errors import ConfigError
from moejax.core.sowing import sow, sow_loss
from moejax.dispatch.experts import AnyExperts
from moejax.layers.interventions import interventions
from moejax.parallel.mesh import BATCH_AXES, batch_ways, shard_map
from moejax.parallel.scope import current
from moejax.routing.losses.adaptive_l1 import AdaptiveLoss
from moejax.routing.losses.base import Loss, Routing
from moejax.routing.plan import Plan, TokenPlan
from moejax.routing.select.base import Select, TokenChoice
from moejax.routing.stats import routing_stats


def plan_tokens(
    module: nn.Module,
    logits: Float[Array, "g n o"],
    select: Select,
    num_experts: int,
    ctx: Context,
    bias: Float[Array, "e"] | None = None,
) -> Routing:
    """What `select` decides for the tokens of `ctx`, under the layer's interventions (`moejax.layers.interventions`).

    In training, a rule that draws gets a key of the module's rng stream 'router'.

    Raises:
      ConfigError: the router's logits, or an intervention, do not fit the rule.
    """
    _check_fit(logits.shape[-1], select, num_experts)
    forced = interventions(module)
    if "logit_bias" in forced:
        logits = logits + forced.pop("logit_bias")
    logits = ctx.clean(logits)
    if forced and not isinstance(select, TokenChoice):
        raise ConfigError(
            f"interventions.{', '.join(forced)} in {'/'.join(module.path)} needs token choice, not {type(select).__name__}"
        )
    draws = ctx.train and "key" in select.needs
    ctx = ctx.replace(key=module.make_rng("router") if draws else None, shared=None, carried=None)

    def plan(logits: Array, ctx: Context, bias: Array | None, forced: dict[str, Array]) -> Plan:
        if "expert" in forced:
            return select.given(logits, forced["expert"], ctx)
        if "k" in forced:
            return select.with_k(logits, forced["k"], ctx, bias=bias)
        return select(logits, ctx, bias=bias)

    # What is drawn is drawn for all groups at once, so that no mesh changes it.
    made = plan(logits, ctx, bias, forced) if draws else _on_each_device(plan, logits, ctx, bias, forced)
    return Routing(logits, select.probabilities(select.within_reach(logits, ctx)), made, ctx.real(logits))


def _check_fit(outputs: int, select: Select, num_experts: int) -> None:
    """Refuses logits that are not what the rule and the experts expect; dispatch would clamp indices in silence."""
    wanted, (each, null) = select.num_outputs(num_experts), select.outputs
    if outputs != wanted:
        also = f" and {null} for null experts" if null else ""
        raise ConfigError(
            f"the router gives {outputs} logits a token, but {type(select).__name__} needs {each} for each of the {num_experts} "
            f"experts{also}; give router and bank one num_experts, and have the router give its `num_outputs` logits"
        )


def _on_each_device(plan: Callable[..., Plan], *args: Any) -> Plan:
    """`plan(*args)`. On a mesh each device plans the groups that it holds: XLA cannot cut kernels, nor every top-k, by itself."""
    parallel = current()
    if parallel is None or parallel.mesh.size == 1 or args[0].shape[0] % batch_ways(parallel.mesh):
        return plan(*args)
    groups = PartitionSpec(BATCH_AXES)
    specs = jax.tree.map(lambda a: groups if a.ndim > 1 else PartitionSpec(), args)
    return shard_map(plan, parallel.mesh, in_specs=specs, out_specs=groups)(*args)


def sow_routing(module: nn.Module, routing: Routing, losses: tuple[Loss, ...], **extra: Array) -> None:
    """Sows every loss, weighted, into 'losses', every statistic into 'stats', and logits, probabilities and plan into 'routing'."""
    sow_losses(module, routing, losses)
    for name, value in {**routing_stats(routing), **extra}.items():
        sow(module, "stats", name, value)
    sow(module, "routing", "logits", routing.logits)
    sow(module, "routing", "probs", routing.probs)
    sow(module, "routing", "plan", routing.plan)


def sow_losses(module: nn.Module, routing: Routing, losses: tuple[Loss, ...], scale: float | Float[Array, ""] = 1.0) -> None:
    """Sows every loss, times `scale`, under its own name. An adaptive one keeps its state in 'router_state'."""
    for loss in losses:
        if isinstance(loss, AdaptiveLoss):
            state = module.variable("router_state", loss.kind, loss.fresh_state).value
            control(module, loss.kind, loss, loss.measure(routing))
            cost = partial(loss, routing, state)
        else:
            cost = partial(loss, routing)
        sow_loss(module, loss.name, lambda cost=cost: scale * cost(), routing.valid.sum())


def group_tokens(x: Float[Array, "b s d"], ctx: Context, by: str) -> tuple[Float[Array, "g n d"], Context]:
    """Tokens and context in the groups that compete for capacity: one 'sequence', the whole 'batch', or each 'position'.

    With 'position', tokens compete only with those of other sequences at the same position, so that rules which select over
    tokens (expert choice) do not see the future of their own sequence. Padding becomes zeros, so that whatever lies there touches
    neither router nor experts.
    """
    x = ctx.clean(x)
    if by == "batch":
        flat = ctx.map_tokens(lambda a: a.reshape(1, -1, *a.shape[2:]), lambda new, old: new.reshape(old.shape))
        return x.reshape(1, -1, x.shape[-1]), flat
    if by == "position":
        return x.swapaxes(0, 1), ctx.map_tokens(lambda a: a.swapaxes(0, 1), lambda new, old: new.swapaxes(0, 1))
    return x, ctx


def ungroup_tokens(y: Float[Array, "g n f"], b: Any, s: Any, by: str) -> Float[Array, "b s f"]:
    """The inverse of `group_tokens`; sizes may be symbolic."""
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
