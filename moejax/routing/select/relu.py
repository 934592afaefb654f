"""ReLU routing (Wang et al. 2024, ReMoE): every expert whose gate is above 0, weighted by that gate; differentiable everywhere."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.core.context import Context
from moejax.core.fields import Count, Positive
from moejax.routing.scores import best, shares, take
from moejax.routing.select.base import TokenChoice, selects


@selects.register("relu")
@dataclasses.dataclass(frozen=True)
class ReLU(TokenChoice):
    """`y = sum of relu(logit_e) expert_e(x)`: no softmax, no top-k, no normalisation.

    A gate reaches 0 exactly where its expert switches off, so the gradient is the true one. The number of experts differs from
    token to token and is about half of them at the start: the loss `adaptive_l1` brings it down to `k` on average. Dropless.
    A balancer's bias says who comes first where `max_experts` is less than all.

    Attributes:
      k: experts per token that training aims at, for counting active parameters; give the loss the same number.
      max_experts: most experts of a token, the largest gates first; None for all of them, as in the paper.
    """

    k: Positive = 1.0
    max_experts: Count | None = None
    causal: ClassVar[bool] = True
    per_token: ClassVar[bool] = True

    def choose(
        self, logits: Float[Array, "g n e"], ctx: Context, bias: Float[Array, "e"] | None
    ) -> tuple[Int[Array, "g n k"], Bool[Array, "g n k"]]:
        if self.max_experts is None:
            expert = jnp.broadcast_to(jnp.arange(logits.shape[-1]), logits.shape)
        else:
            expert = best(logits if bias is None else logits + bias, self.max_experts)
        return expert, self.accepts(logits, expert, ctx)

    def accepts(self, logits: Float[Array, "g n e"], expert: Int[Array, "g n k"], ctx: Context) -> Bool[Array, "g n k"]:
        """Those whose gates are above 0."""
        return take(logits, expert) > 0

    def weights(
        self, logits: Float[Array, "g n e"], expert: Int[Array, "g n k"], wanted: Bool[Array, "g n k"], ctx: Context
    ) -> Float[Array, "g n k"]:
        return jax.nn.relu(take(logits, expert))

    def probabilities(self, logits: Float[Array, "g n e"]) -> Float[Array, "g n e"]:
        """Each gate's share of their sum; all 0 for a token that takes no expert."""
        return shares(jax.nn.relu(logits))
