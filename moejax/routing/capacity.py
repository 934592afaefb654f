"""Capacity: how many rows of a group an expert takes, and who is refused when it is full.

Documents that are packed into one row are one group, and an earlier one may take a slot that a later one wanted. There is no group
for each document: shapes are static and the lengths of documents are data, so that every document would need a buffer for the
longest one; and a capacity is rounded up to at least one slot of every expert, so that many short documents would buy far more
slots than their tokens are worth, and next to nothing would be refused. Whose documents must not touch each other takes a rule
without capacity, or `data.packing=False`.
"""

import math
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from moejax.core.errors import check_choice
from moejax.routing.plan import TokenPlan, rank_in_expert

Priority = Literal["token", "choice", "score"]
PRIORITIES: tuple[Priority, ...] = ("token", "choice", "score")


def compute_capacity(num_tokens: int, num_experts: int, k: int, factor: float) -> int:
    """Slots of one expert for one group: `ceil(num_tokens * k * factor / num_experts)`, at least 1, at most num_tokens.

    This is the only definition of capacity in the library. `factor = 1` has room for exactly all choices under perfect balance,
    whatever k is; libraries that leave k out (flaxformer) or fold it in (DeepSpeed's top-2) name other numbers by the same word.
    `num_tokens` counts valid tokens of the group only, so padding never buys room. A token chooses an expert at most once, hence
    the upper bound.
    """
    if num_tokens == 0:
        return 0
    # The small slack absorbs the rounding of factors such as 1.1, which are not exact in binary.
    return min(num_tokens, max(1, math.ceil(num_tokens * k * factor / num_experts - 1e-9)))


def capacity_of(
    valid: Bool[Array, "g n"] | None, n: int, num_experts: int, k: int, factor: float
) -> tuple[int, Int[Array, "g"] | int]:
    """The static buffer size for groups of n tokens, and each group's own capacity given how many of its tokens are valid."""
    buffer = compute_capacity(n, num_experts, k, factor)
    if valid is None:
        return buffer, buffer
    i = np.arange(n + 1)
    table = np.minimum(i, np.maximum(1, np.ceil(i * k * factor / num_experts - 1e-9))).astype(np.int32)  # `compute_capacity`
    return buffer, jnp.asarray(table)[valid.sum(1)]


def drop_over_capacity(
    plan: TokenPlan, valid: Bool[Array, "g n"] | None, factor: float, priority: Priority, score: Float[Array, "g n"]
) -> TokenPlan:
    """Refuses choices that find their expert full. Earlier choices in priority order come first:

    - `token`: in token order, all choices of a token before any of the next. Causal inside a group.
    - `choice`: all first choices in token order, then all second choices, ... (GShard, Switch for k=1). Not causal for k > 1.
    - `score`: tokens with larger `score` first, then as `choice` (batch-prioritised, V-MoE). Not causal.
    """
    check_choice("priority", priority, PRIORITIES)
    g, n, k = plan.expert.shape
    buffer, limit = capacity_of(valid, n, plan.num_experts, k, factor)
    limit = jnp.broadcast_to(jnp.asarray(limit, jnp.int32), (g,))
    wanted = plan.used
    expert = plan.expert
    if priority == "score":
        by_score = jnp.argsort(-score, axis=1, stable=True)
        expert = jnp.take_along_axis(expert, by_score[..., None], axis=1)
        wanted = jnp.take_along_axis(wanted, by_score[..., None], axis=1)
    if priority == "token":
        rank = rank_in_expert(expert.reshape(g, n * k), wanted.reshape(g, n * k), plan.num_experts).reshape(g, n, k)
    else:
        flat = expert.swapaxes(1, 2).reshape(g, n * k), wanted.swapaxes(1, 2).reshape(g, n * k)
        rank = rank_in_expert(*flat, plan.num_experts).reshape(g, k, n).swapaxes(1, 2)
    if priority == "score":
        rank = jnp.take_along_axis(rank, jnp.argsort(by_score, axis=1)[..., None], axis=1)
    kept = plan.used & (rank < limit[:, None, None])
    return plan.replace(used=kept, dropped=plan.used & ~kept, capacity=buffer, limit=limit)
