"""Top-p token choice: as many experts as it takes (Huang et al. 2024, "Harder Tasks Need More Experts")."""

import dataclasses
import math
from typing import Annotated, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.core.context import Context
from moejax.core.fields import Count, In
from moejax.routing.scores import best, take
from moejax.routing.select.base import TokenChoice, selects


@selects.register("top_p")
@dataclasses.dataclass(frozen=True)
class TopP(TokenChoice):
    """Each token takes its most probable experts until their probabilities sum to `p`; weights are the raw probabilities.

    A peaked router uses one expert, a flat one `p * e` of them (at the start nearly all tokens). Ties go to the lowest index.
    The weights sum to between p and 1. Dropless. Without `Entropy` among the losses, routers drift to flat distributions. With
    a balancer's bias, experts are tried in the order of their biased probabilities.

    Attributes:
      p: the threshold, above 0 and below 1 (the paper: 0.4).
      max_experts: most experts of a token; the plan's static k. None for all of them.
    """

    p: Annotated[float, In(above=0, below=1)] = 0.4
    max_experts: Count | None = None
    causal: ClassVar[bool] = True
    per_token: ClassVar[bool] = True

    def choose(
        self, logits: Float[Array, "g n e"], ctx: Context, bias: Float[Array, "e"] | None
    ) -> tuple[Int[Array, "g n k"], Bool[Array, "g n k"]]:
        ranking = logits if bias is None else self.probabilities(logits) + bias
        expert = best(ranking, self.max_experts or logits.shape[-1])
        return expert, self.accepts(logits, expert, ctx)

    def accepts(self, logits: Float[Array, "g n e"], expert: Int[Array, "g n k"], ctx: Context) -> Bool[Array, "g n k"]:
        """In their order, until the threshold is reached."""
        probs = take(self.probabilities(logits), expert)
        return jnp.cumsum(probs, axis=-1) - probs < self.p

    def mean_experts(self, num_experts: int) -> float:
        """Experts of a token whose router is flat, which is the most that they can need."""
        return float(min(math.ceil(self.p * num_experts), self.max_experts or num_experts))
