"""Expert choice: experts pick their tokens (Zhou et al. 2022); with one 'expert', a block picks its tokens (mixture-of-depths)."""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moejax.core.errors import ConfigError, check_choice
from moejax.routing.capacity import capacity_of
from moejax.routing.plan import ExpertPlan
from moejax.routing.select.base import all_valid, probabilities, selects

SCORES = ("softmax", "sigmoid", "logit")


@selects.register("expert_choice")
@dataclasses.dataclass(frozen=True)
class ExpertChoice:
    """Each expert takes the `capacity_factor * n / e` tokens of its group that score highest; ties go to the earlier token.

    Load is perfectly balanced and a token gets between 0 and e experts. Selection runs over the token axis, so a token's plan
    depends on later tokens: never causal within a group.

    Attributes:
      capacity_factor: mean number of experts per token (the paper's c).
      score: `softmax` over experts (the paper), `sigmoid`, or the raw `logit` (mixture-of-depths).
      normalise: divide each token's weights by their sum over the experts that chose it (sparse upcycling in vision).
      in_order: sort each expert's tokens by position, which causal attention among them needs.
    """

    capacity_factor: float = 2.0
    score: Literal["softmax", "sigmoid", "logit"] = "softmax"
    normalise: bool = False
    in_order: bool = False
    causal: ClassVar[bool] = False
    per_token: ClassVar[bool] = False
    num_outputs_per_expert: ClassVar[int] = 1
    needs_key: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_choice("score", self.score, SCORES)
        if self.capacity_factor <= 0:
            raise ConfigError(f"capacity_factor={self.capacity_factor} must be positive")

    def __call__(
        self,
        logits: Float[Array, "g n e"],
        valid: Bool[Array, "g n"] | None = None,
        *,
        bias: Float[Array, "e"] | None = None,
        train: bool = False,
    ) -> ExpertPlan:
        """The plan; see `Select`."""
        g, n, e = logits.shape
        if self.score == "logit":
            scores = logits
        else:
            scores = jax.nn.softmax(logits, axis=-1) if self.score == "softmax" else jax.nn.sigmoid(logits)
        mask = all_valid(logits) if valid is None else valid
        ranking = jnp.where(mask[..., None], scores if bias is None else scores + bias, -jnp.inf)
        buffer, limit = capacity_of(valid, n, e, 1, self.capacity_factor)
        _, token = jax.lax.top_k(ranking.swapaxes(1, 2), buffer)  # g e c
        limit = jnp.broadcast_to(jnp.asarray(limit), (g,))[:, None, None]
        used = (jnp.arange(buffer) < limit) & jnp.take_along_axis(mask[:, None], token, axis=2)
        if self.in_order:
            order = jnp.argsort(jnp.where(used, token, n), axis=2)
            token, used = jnp.take_along_axis(token, order, axis=2), jnp.take_along_axis(used, order, axis=2)
        weight = jnp.take_along_axis(scores.swapaxes(1, 2), token, axis=2)
        plan = ExpertPlan(token.astype(jnp.int32), weight, used, num_tokens=n)
        if self.normalise:
            total = plan.dense().sum(-1)  # g n
            weight = weight / (jnp.take_along_axis(total[:, None], token, axis=2) + 1e-20)
            plan = plan.replace(weight=weight)
        return plan

    def probabilities(self, logits: Float[Array, "g n e"]) -> Float[Array, "g n e"]:
        return probabilities(logits, self.score)

    def mean_experts(self, num_experts: int) -> float:
        """Experts per token, on average; an expert never takes a token twice."""
        return min(self.capacity_factor, float(num_experts))
