"""The entropy of average use, maximised (sigma-MoE, Csordas et al. 2023)."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.routing.losses.base import Loss, Routing, batch_mean, losses, masked_mean, mean_of_groups


@losses.register("spread")
@dataclasses.dataclass(frozen=True)
class Spread(Loss):
    """`coef * sum_e p_e log p_e` with p the mean of softmax(logits) over tokens: the entropy of average use, maximised (Csordas et al.
    2023). Minus `coef * log e` at best, and no number of choices in it. The softmax is of the raw logits whatever rule selects.

    Attributes:
      coef: gamma, above 0 to spread the load.
      over: p is of the 'batch' (sigma-MoE), or of each 'group', whose losses are averaged (MoEUT's choice).
    """

    coef: float = 1e-3
    over: Literal["batch", "group"] = "batch"

    def cost(self, routing: Routing) -> Float[Array, ""]:
        probs = jax.nn.softmax(routing.logits, axis=-1)
        p = batch_mean(probs, routing.valid) if self.over == "batch" else masked_mean(probs, routing.valid, (1,))
        negative = (p * jnp.log(jnp.where(p > 0, p, 1))).sum(-1)
        return negative if self.over == "batch" else mean_of_groups(negative, routing.valid)
