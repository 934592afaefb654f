"""The z-loss (ST-MoE, Zoph et al. 2022)."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.routing.losses.base import Loss, Routing, losses, masked_mean


@losses.register("z")
@dataclasses.dataclass(frozen=True)
class ZLoss(Loss):
    """`coef * mean_t logsumexp(logits_t)^2` keeps router logits small (Zoph et al. 2022, eq. 5)."""

    coef: float = 1e-3

    def cost(self, routing: Routing) -> Float[Array, ""]:
        return masked_mean(jnp.square(jax.nn.logsumexp(routing.logits, axis=-1)), routing.valid, (0, 1))
