"""Expert choice: experts pick their tokens (Zhou et al. 2022); with one 'expert', a block picks its tokens (mixture-of-depths)."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.core.context import Context
from moejax.core.fields import Positive
from moejax.routing.capacity import capacity_of
from moejax.routing.plan import ExpertPlan
from moejax.routing.scores import best, shares, softmax_over
from moejax.routing.select.base import Select, selects


@selects.register("expert_choice")
@dataclasses.dataclass(frozen=True)
class ExpertChoice(Select):
    """Each expert takes the `capacity_factor * n / e` tokens of its group that score highest; ties go to the earlier token.

    Load is perfectly balanced and a token gets between 0 and e experts. Selection runs over the token axis, so a token's plan
    depends on later tokens: never causal within a group.

    Attributes:
      capacity_factor: mean number of experts per token (the paper's c).
      score: `softmax` over experts (the paper), `sigmoid`, or the raw `logit` (mixture-of-depths).
      normalise: divide each token's weights by their sum over the experts that chose it (sparse upcycling in vision).
      in_order: sort each expert's tokens by position, which causal attention among them needs.
    """

    capacity_factor: Positive = 2.0
    score: Literal["softmax", "sigmoid", "logit"] = "softmax"
    normalise: bool = False
    in_order: bool = False

    def plan(self, logits: Float[Array, "g n e"], ctx: Context, bias: Float[Array, "e"] | None) -> ExpertPlan:
        n = logits.shape[1]
        scores = self._scores(logits)
        token, used = self._choose(scores if bias is None else scores + bias, ctx)
        plan = ExpertPlan(token, jnp.zeros(token.shape), used, num_tokens=n)
        weight = self._normalised(logits, plan.assigned() > 0) if self.normalise else scores
        return plan.replace(weight=jnp.take_along_axis(weight.swapaxes(1, 2), token, axis=2))

    def probabilities(self, logits: Float[Array, "g n e"]) -> Float[Array, "g n e"]:
        """Softmax, or sigmoids divided by their sum."""
        return jax.nn.softmax(jax.nn.log_sigmoid(logits) if self.score == "sigmoid" else logits, axis=-1)

    def mean_experts(self, num_experts: int) -> float:
        """Experts per token, on average; an expert never takes a token twice."""
        return min(self.capacity_factor, float(num_experts))

    def _choose(self, ranking: Float[Array, "g n e"], ctx: Context) -> tuple[Int[Array, "g e c"], Bool[Array, "g e c"]]:
        """Each expert's tokens, and which of these slots are filled."""
        g, n, e = ranking.shape
        real = ctx.real(ranking)
        buffer, limit = capacity_of(ctx.valid, n, e, 1, self.capacity_factor)
        token = best(jnp.where(real[..., None], ranking, -jnp.inf).swapaxes(1, 2), buffer)
        limit = jnp.broadcast_to(jnp.asarray(limit), (g,))[:, None, None]
        used = (jnp.arange(buffer) < limit) & jnp.take_along_axis(real[:, None], token, axis=2)
        if self.in_order:
            order = jnp.argsort(jnp.where(used, token, n), axis=2)
            token, used = jnp.take_along_axis(token, order, axis=2), jnp.take_along_axis(used, order, axis=2)
        return token.astype(jnp.int32), used

    def _scores(self, logits: Float[Array, "g n e"]) -> Float[Array, "g n e"]:
        if self.score == "logit":
            return logits
        return jax.nn.softmax(logits, axis=-1) if self.score == "softmax" else jax.nn.sigmoid(logits)

    def _normalised(self, logits: Float[Array, "g n e"], chosen: Bool[Array, "g n e"]) -> Float[Array, "g n e"]:
        """Scores divided by their sum over the experts that chose the token."""
        if self.score == "logit":
            return shares(jnp.where(chosen, logits, 0))
        return softmax_over(logits if self.score == "softmax" else jax.nn.log_sigmoid(logits), chosen)
