"""The importance loss (Shazeer et al. 2017)."""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.core.errors import check_choice
from moejax.routing.losses.base import Routing, losses


@losses.register("importance")
@dataclasses.dataclass(frozen=True)
class Importance:
    """`coef * CV(importance)^2`, importance being each expert's summed gate over the batch (Shazeer et al. 2017, eq. 6-7).

    Attributes:
      coef: weight.
      gates: 'weights' sums the plan's weights of used choices, as the paper does; 'probs' sums all probabilities.
    """

    coef: float = 0.1
    gates: Literal["weights", "probs"] = "weights"

    def __post_init__(self) -> None:
        check_choice("gates", self.gates, ("weights", "probs"))

    def __call__(self, routing: Routing) -> Float[Array, ""]:
        gates = routing.probs if self.gates == "probs" or not hasattr(routing.plan, "dense") else routing.plan.dense()
        importance = (gates * routing.valid[..., None]).sum((0, 1))
        return self.coef * importance.var() / (jnp.square(importance.mean()) + 1e-10)
