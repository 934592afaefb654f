"""The router in plain XLA: one fused pass over the logits on a CPU, where `lax.top_k` is a sort of each row."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.router.selection import LOWEST, Routed, Rule, choose, top_k_by_rounds


# Rounds of maxima run over all experts k times at vector speed, `lax.top_k` once at scalar speed. Medians on two x86-64 cores with
# 4,096 tokens, time of rounds relative to `lax.top_k`: 8 experts 0.2 to 0.5; 32 to 128 experts 0.4 to 1.0, less for k=1 than for k=8;
# 256 and 512 experts 0.7 to 0.9 for k=1, 1.1 to 1.4 for k=2, 2 to 4 for 512 and k=8.
def _rounds_are_faster(e: int, k: int) -> bool:
    return k == 1 or (e <= 128 and k <= 8)


def top_k(scores: Float[Array, "*b e"], k: int) -> tuple[Float[Array, "*b k"], Int[Array, "*b k"]]:
    """Like `lax.top_k`, ties to the lowest index included, and faster on CPU for few experts and small k.

    Differs in three things: no gradient flows (take scores by index where one should), -inf comes back as the lowest float32, and NaN
    gives some index in range.
    """
    rank = jnp.maximum(jax.lax.stop_gradient(scores).astype(jnp.float32), LOWEST)
    axis = scores.ndim - 1
    values, index = best_of_both(rank, k, axis, jax.lax.broadcasted_iota(jnp.int32, scores.shape, axis))
    return jnp.concatenate(values, axis), jnp.concatenate(index, axis)


def best_of_both(rank: Array, k: int, axis: int, index: Array) -> tuple[list[Array], list[Array]]:
    """`top_k_by_rounds`, or `lax.top_k` where that is faster on CPU. `index` counts along the axis, which is the last."""
    e = rank.shape[axis]
    if not _rounds_are_faster(e, k):
        # The barrier keeps XLA from merging slices with `top_k`, which turns it into a full sort: ten times slower.
        values, picks = jax.lax.optimization_barrier(jax.lax.top_k(rank, k))
        return jnp.split(values, k, axis), jnp.split(picks.astype(jnp.int32), k, axis)
    values, picks = top_k_by_rounds(rank, k, axis, index)
    return values, [jnp.minimum(pick, e - 1) for pick in picks]


def route(x: Array, w: Array, bias: Array | None, valid: Array, rule: Rule) -> Routed:
    """See the package."""
    logits = jnp.dot(x.astype(jnp.float32), w.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    choice = choose(logits, bias, rule, 1, best_of_both)
    here = valid[:, None]
    return Routed(
        jnp.concatenate(choice.expert, 1),
        jnp.concatenate(choice.weight, 1),
        logits,
        (choice.chosen & here).sum(0, dtype=jnp.int32),
        jnp.where(here, choice.scores, 0).sum(0),
        choice.z[:, 0],
    )
