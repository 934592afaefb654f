"""Null experts (Zeng et al. 2024, AdaMoE): a token may spend its choices on experts that do nothing, and so takes fewer."""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.core.context import Context
from moejax.core.fields import Count
from moejax.routing.scores import best, softmax_over, take
from moejax.routing.select.base import TokenChoice, selects


@selects.register("null_experts")
@dataclasses.dataclass(frozen=True)
class NullExperts(TokenChoice):
    """Top-k of e true experts and `num_null` null ones, whose output is 0 and which cost nothing.

    The router gives e + num_null logits; p is their softmax. Weights are `p_i` divided by the sum of p over the chosen true
    experts. A token takes between 0 and k true experts, `k e / (e + num_null)` of them on average under a uniform load; one that
    takes none gets exactly 0. Ties go to the lowest index, so to true experts. Dropless. A balancer's bias is for true experts only.

    Attributes:
      k: choices of a token, null ones included.
      num_null: number of null experts.
      normalise: weights sum to 1 over the chosen 'true' experts (the paper), over all 'selected' ones with the null ones'
        shares lost, or are the raw probabilities ('none').
    """

    k: Count = 4
    num_null: Count = 8
    normalise: Literal["true", "selected", "none"] = "true"
    causal: ClassVar[bool] = True
    per_token: ClassVar[bool] = True

    @property
    def null_outputs(self) -> int:
        return self.num_null

    def choose(
        self, logits: Float[Array, "g n o"], ctx: Context, bias: Float[Array, "e"] | None
    ) -> tuple[Int[Array, "g n k"], Bool[Array, "g n k"]]:
        ranking = logits if bias is None else jax.nn.softmax(logits, axis=-1) + jnp.pad(bias, (0, self.num_null))
        expert = best(ranking, self.k)
        return expert, jnp.ones(expert.shape, bool)

    def weights(
        self, logits: Float[Array, "g n o"], expert: Int[Array, "g n k"], wanted: Bool[Array, "g n k"], ctx: Context
    ) -> Float[Array, "g n k"]:
        if self.normalise == "none":
            return take(jax.nn.softmax(logits, axis=-1), expert)
        true = expert < logits.shape[-1] - self.num_null
        return softmax_over(take(logits, expert), wanted & true if self.normalise == "true" else wanted)

    def widest(self, num_experts: int) -> "NullExperts":
        return dataclasses.replace(self, k=num_experts + self.num_null)

    def probabilities(self, logits: Float[Array, "g n o"]) -> Float[Array, "g n e"]:
        """Probabilities of the true experts; what their sum lacks to 1 is the null experts'."""
        return jax.nn.softmax(logits, axis=-1)[..., : -self.num_null]

    def mean_experts(self, num_experts: int) -> float:
        """True experts of a token under a uniform load."""
        return min(self.k * num_experts / (num_experts + self.num_null), float(num_experts))
