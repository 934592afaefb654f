"""The loss of DynMoE's released models (Guo et al. 2024)."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.core.fields import NonNegative
from moejax.routing.losses.base import Loss, Routing, batch_mean, losses, masked_mean


@losses.register("top_any")
@dataclasses.dataclass(frozen=True)
class TopAnyLoss(Loss):
    """`coef * (balance * e^2 mean_e(mean_t(g_te / sum_e g_te) mean_t[g_te]) + efficiency * mean_te g_te)` with gates g of 0 and 1.

    The form of the released vision-language models (DeepSpeed); the paper itself has no such loss, only the one on embeddings that
    the router `expert_pool` sows. It presses on busy experts and on the number of experts. The means of the first term are over the
    tokens that take an expert, that of the second over all tokens. [g] passes no gradient; the other gates pass it
    straight through, the first ones through their sum too.
    """

    coef: float = 0.01
    balance: NonNegative = 1.0
    efficiency: NonNegative = 1.0

    def cost(self, routing: Routing) -> Float[Array, ""]:
        e = routing.plan.num_experts
        k = jax.lax.stop_gradient(routing.plan.assigned()).sum(-1, keepdims=True)
        gates = routing.plan.dense() * k  # weights are g / k, in which k passes no gradient
        some = routing.valid & (k[..., 0] > 0)
        share = gates / jnp.where(some[..., None], gates.sum(-1, keepdims=True), 1)
        busy = jax.lax.stop_gradient(batch_mean(gates, some))
        balance = e**2 * (batch_mean(share, some) * busy).mean()
        return self.balance * balance + self.efficiency * masked_mean(gates, routing.valid, (0, 1)).mean()
