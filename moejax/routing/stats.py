"""Statistics that every routed layer reports, whatever its router: load, importance, drops, entropy, z."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moejax.routing.losses.base import Routing, masked_mean
from moejax.routing.plan import ExpertPlan, Plan, TokenPlan


def routing_stats(routing: Routing) -> dict[str, Array]:
    """Scalars and per-expert vectors that describe a layer's routing of one batch; padding counts nowhere.

    - load[e]: share of all executed token-expert pairs that went to each expert (for soft plans: share of combine weight).
    - importance[e]: mean probability of each expert.
    - drop_rate: share of wanted pairs that were refused for capacity.
    - unrouted: share of tokens that no expert processes.
    - experts_per_token: mean number of experts that process a token (for soft plans: 1).
    - entropy: mean entropy of a token's distribution, in nats.
    - z: mean squared log-partition of the logits.
    - max_logit: largest absolute logit.
    - load_entropy: entropy of the load, in nats; log e is perfect balance.
    - max_violation: largest load relative to the mean, minus 1 (0 is perfect balance).
    - capacity: slots per expert, on average over groups with valid tokens, or -1 for dropless and soft plans.
    """
    plan, valid = routing.plan, routing.valid
    tokens = jnp.maximum(valid.sum(), 1)
    mask = valid[..., None]
    assigned = jnp.where(mask, jax.lax.stop_gradient(plan.assigned()), 0)
    wanted = jnp.where(mask, jax.lax.stop_gradient(plan.wanted()), 0)
    per_expert = assigned.sum((0, 1))
    load = per_expert / jnp.maximum(per_expert.sum(), 1e-9)
    probs = jax.lax.stop_gradient(routing.probs)
    entropy = -(probs * jnp.log(probs + 1e-20)).sum(-1)
    logits = jax.lax.stop_gradient(routing.logits)
    z = jnp.square(jax.nn.logsumexp(logits, axis=-1))
    return {
        "load": load,
        "importance": masked_mean(probs, valid, (0, 1)),
        "drop_rate": (wanted.sum() - assigned.sum()) / jnp.maximum(wanted.sum(), 1e-9),
        "unrouted": ((assigned.sum(-1) == 0) & valid).sum() / tokens,
        "experts_per_token": assigned.sum() / tokens,
        "entropy": masked_mean(entropy, valid, (0, 1)),
        "z": masked_mean(z, valid, (0, 1)),
        "max_logit": jnp.where(mask, jnp.abs(logits), 0).max(),
        "load_entropy": -(load * jnp.log(load + 1e-20)).sum(),
        "max_violation": load.max() * load.shape[0] - 1,
        "capacity": _mean_capacity(plan, valid),
    }


def routing_overlap(plan: TokenPlan, other: TokenPlan, valid: Bool[Array, "g n"]) -> Float[Array, ""]:
    """Mean share of a token's experts under `other` that it also has under `plan`; tokens without any there count nothing.

    Between an early and the final checkpoint of one training this is router saturation (Muennighoff et al. 2024); one minus it,
    between successive checkpoints, is the change rate (Nguyen et al. 2025). Both plans are of the same tokens.
    """
    ours, theirs = plan.assigned() > 0, other.assigned() > 0
    count = theirs.sum(-1)
    shared = (ours & theirs).sum(-1) / jnp.maximum(count, 1)
    return masked_mean(shared, valid & (count > 0), (0, 1))


def _mean_capacity(plan: Plan, valid: Bool[Array, "g n"]) -> Float[Array, ""]:
    if isinstance(plan, ExpertPlan):
        per_group = plan.used.sum(-1).max(-1)
    elif isinstance(plan, TokenPlan) and plan.limit is not None:
        per_group = plan.limit
    else:
        return jnp.float32(-1)
    return masked_mean(per_group[:, None].astype(jnp.float32), valid.any(1, keepdims=True), (0, 1))
