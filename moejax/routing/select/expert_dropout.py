"""Expert dropout: in training, some experts are out of a token's reach (sigma-MoE, Csordas et al. 2023)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from moejax.core.errors import ConfigError
from moejax.routing.plan import TokenPlan
from moejax.routing.select.base import selects


@selects.register("expert_dropout", slots={"select": selects})
@dataclasses.dataclass(frozen=True)
class ExpertDropout:
    """The rule `select`, for which each expert of each token is missing with probability `rate` in training.

    Experts go missing before the selection, so a token still takes k of those that are left (fewer only if fewer are), and
    nothing is scaled up for it: with sigmoid weights this is `s * mask` before top-k. Losses and statistics see the router's own
    probabilities. Outside training it is `select`.

    Attributes:
      select: a rule of token choice.
      rate: delta, at least 0 and below 1.
    """

    select: Any
    rate: float = 0.05

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise ConfigError(f"rate={self.rate} must be at least 0 and below 1")

    @property
    def causal(self) -> bool:
        return self.select.causal

    @property
    def per_token(self) -> bool:
        return self.select.per_token

    @property
    def num_outputs_per_expert(self) -> int:
        return self.select.num_outputs_per_expert

    @property
    def needs_key(self) -> bool:
        return self.rate > 0 or self.select.needs_key

    def __call__(
        self,
        logits: Float[Array, "g n e"],
        valid: Bool[Array, "g n"] | None = None,
        *,
        bias: Float[Array, "e"] | None = None,
        train: bool = False,
        key: Key[Array, ""] | None = None,
    ) -> TokenPlan:
        """The plan; see `Select`. Raises ConfigError for a rule that is not token choice."""
        more = {"key": jax.random.fold_in(key, 1)} if train and self.select.needs_key else {}
        if not train or not self.rate:
            return self.select(logits, valid, bias=bias, train=train, **more)
        here = jax.random.bernoulli(key, 1 - self.rate, logits.shape)
        # Far below every logit: a weight of 0, except as a raw logit, which `used` keeps out.
        plan = self.select(jnp.where(here, logits, -1e9), valid, bias=bias, train=train, **more)
        if not isinstance(plan, TokenPlan):
            raise ConfigError(
                f"expert_dropout needs token choice, and {type(self.select).__name__} gives {type(plan).__name__}"
            )
        here = jnp.take_along_axis(here, plan.expert, axis=-1)
        return plan.replace(used=plan.used & here, dropped=plan.dropped & here)

    def weigh(
        self,
        logits: Float[Array, "g n e"],
        expert: Int[Array, "g n k"],
        valid: Bool[Array, "g n"] | None = None,
        *,
        train: bool = False,
    ) -> TokenPlan:
        """The plan in which each token takes the given experts; none is missing."""
        return self.select.weigh(logits, expert, valid, train=train)

    def probabilities(self, logits: Float[Array, "g n e"]) -> Float[Array, "g n e"]:
        return self.select.probabilities(logits)

    def check_num_experts(self, num_experts: int) -> None:
        """What `select` refuses."""
        if hasattr(self.select, "check_num_experts"):
            self.select.check_num_experts(num_experts)

    def mean_experts(self, num_experts: int) -> float:
        """Experts per token outside training."""
        return self.select.mean_experts(num_experts)
