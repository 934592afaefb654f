"""The balance loss for rules with null experts (AdaMoE, Zeng et al. 2024)."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.routing.losses.base import Loss, Routing, batch_mean, losses
from moejax.routing.scores import best


@losses.register("null_balance")
@dataclasses.dataclass(frozen=True)
class NullBalance(Loss):
    """`coef * (e + m) * sum_i f_i P_i` over e true and m null experts, each null one with the mean f of all m.

    f is the share of choices and P the mean probability, over the batch; f passes no gradient. Null experts are
    interchangeable, so only how much goes to them together is balanced: towards m / (e + m) of all choices. 1 times `coef` under
    uniform routing. Without it, routers trained from scratch may send everything to null experts.

    Attributes:
      coef: weight (the paper: 1e-3 with LoRA experts, 1e-4 in Mixtral).
      null: 'mean' as above, or 'each' to balance the null experts one by one (the paper's ablation).
    """

    coef: float = 1e-3
    null: Literal["mean", "each"] = "mean"

    def cost(self, routing: Routing) -> Float[Array, ""]:
        e, o, k = routing.plan.num_experts, routing.logits.shape[-1], routing.plan.expert.shape[-1]
        # A plan does not say which null experts were chosen; the logits do.
        chosen = jax.nn.one_hot(best(routing.logits, k), o).sum(-2)
        share = batch_mean(chosen, routing.valid) / k
        if self.null == "mean":
            share = jnp.where(jnp.arange(o) < e, share, share[e:].mean())
        mean_prob = batch_mean(jax.nn.softmax(routing.logits, axis=-1), routing.valid)
        return o * (jax.lax.stop_gradient(share) * mean_prob).sum()
