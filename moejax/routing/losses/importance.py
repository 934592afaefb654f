"""The importance loss (Shazeer et al. 2017)."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.core.sowing import batch_sum
from moejax.routing.losses.base import Loss, Routing, losses


@losses.register("importance")
@dataclasses.dataclass(frozen=True)
class Importance(Loss):
    """`coef * CV(importance)^2`, importance being each expert's summed gate over the batch (Shazeer et al. 2017, eq. 6-7).

    Attributes:
      coef: weight.
      gates: 'weights' sums the plan's weights of used choices, as the paper does; 'probs' sums all probabilities.
    """

    coef: float = 0.1
    gates: Literal["weights", "probs"] = "weights"

    def cost(self, routing: Routing) -> Float[Array, ""]:
        gates = routing.probs if self.gates == "probs" or not hasattr(routing.plan, "dense") else routing.plan.dense()
        importance = batch_sum(jnp.where(routing.valid[..., None], gates, 0).sum((0, 1)))
        # The coefficient of variation does not depend on the scale, so gates of any size are brought to one.
        size = jax.lax.stop_gradient(jnp.abs(importance).max())
        importance = importance / jnp.where(size > 0, size, 1)
        squared = jnp.square(importance.mean())
        return importance.var() / jnp.where(squared > 0, squared, 1)
