"""The entropy of a token's distribution, minimised (Huang et al. 2024)."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.routing.losses.base import Loss, Routing, losses, masked_mean


@losses.register("entropy")
@dataclasses.dataclass(frozen=True)
class Entropy(Loss):
    """`coef * mean_t H(probs_t)`, in nats, minimised: a token's router is to make up its mind (Huang et al. 2024)."""

    coef: float = 1e-4

    def cost(self, routing: Routing) -> Float[Array, ""]:
        # The logarithm's derivative at 0 is infinite, and 0 * log 0 is 0.
        safe = jnp.where(routing.probs > 0, routing.probs, 1)
        return masked_mean(-(routing.probs * jnp.log(safe)).sum(-1), routing.valid, (0, 1))
