"""Two experts per token, the second one only with some probability: GShard (Lepikhin et al. 2020, algorithm 1) and ST-MoE (Zoph et
al. 2022, section 2)."""

import dataclasses
from typing import ClassVar, Literal

import jax
from jaxtyping import Array, Bool, Float, Int

from moejax.core.errors import ConfigError
from moejax.routing.capacity import Priority, drop_over_capacity
from moejax.routing.plan import TokenPlan
from moejax.routing.select.base import selects
from moejax.routing.select.top_k import TopK


@selects.register("gshard")
@dataclasses.dataclass(frozen=True)
class GShard:
    """Top-2 in which training keeps a token's second expert with probability `min(1, g2 / threshold)`, so that near-useless second
    choices leave their capacity to others.

    g1 and g2 are the two softmax probabilities divided by their sum. A second choice that is not drawn is neither used nor dropped,
    and g1 stays what it was. Outside training nothing is drawn: the rule is top-2.

    Attributes:
      capacity_factor: see `capacity.compute_capacity`, with k = 2 (the paper's `C = 2 n / e` at 1); None is dropless.
      eval_capacity_factor: the factor outside training; 'same' by default (ST-MoE: 1.25 in training, 2 outside).
      threshold: the g2 from which on a second expert is always kept: 0.5 is GShard's `2 g2`, 0.2 is ST-MoE's.
      priority: 'choice' serves all first choices of a group before any second one; 'score' the tokens with the largest probability
        first (batch-prioritised routing, an option of ST-MoE). See `capacity.drop_over_capacity`.
    """

    capacity_factor: float | None = 1.0
    eval_capacity_factor: float | None | Literal["same"] = "same"
    threshold: float = 0.5
    priority: Priority = "choice"
    num_outputs_per_expert: ClassVar[int] = 1
    needs_key: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _ = self._top_2  # checks the factors and the priority
        if not 0 < self.threshold <= 0.5:
            raise ConfigError(
                f"threshold={self.threshold} must lie in (0, 0.5]: the smaller of two gates that sum to 1 is compared"
            )

    @property
    def causal(self) -> bool:
        return self._top_2.causal

    @property
    def per_token(self) -> bool:
        return self._top_2.per_token

    def __call__(
        self,
        logits: Float[Array, "g n e"],
        valid: Bool[Array, "g n"] | None = None,
        *,
        bias: Float[Array, "e"] | None = None,
        train: bool = False,
        key: Array | None = None,
    ) -> TokenPlan:
        """The plan; see `Select`. Raises ConfigError in training without a `key`."""
        if not train:
            return self._top_2(logits, valid, bias=bias)
        if key is None:
            raise ConfigError("the select rule 'gshard' draws at random in training; give it key=...")
        plan = dataclasses.replace(self._top_2, capacity_factor=None)(logits, valid, bias=bias, train=True)
        drawn = plan.weight[..., 1] / self.threshold > jax.random.uniform(key, logits.shape[:2])
        plan = plan.replace(used=plan.used.at[..., 1].set(plan.used[..., 1] & drawn))
        if self.capacity_factor is None:
            return plan
        score = self.probabilities(logits).max(-1)
        return drop_over_capacity(plan, valid, self.capacity_factor, self.priority, score=score)

    def weigh(
        self,
        logits: Float[Array, "g n e"],
        expert: Int[Array, "g n k"],
        valid: Bool[Array, "g n"] | None = None,
        *,
        train: bool = False,
    ) -> TokenPlan:
        """The plan in which each token takes the given experts; nothing is drawn."""
        return self._top_2.weigh(logits, expert, valid, train=train)

    def probabilities(self, logits: Float[Array, "g n e"]) -> Float[Array, "g n e"]:
        return jax.nn.softmax(logits, axis=-1)

    def mean_experts(self, num_experts: int) -> float:
        """Experts per token outside training; at most that in training."""
        return 2.0

    def check_num_experts(self, num_experts: int) -> None:
        """Raises ConfigError if there are fewer than two experts."""
        self._top_2.check_num_experts(num_experts)

    @property
    def _top_2(self) -> TopK:
        factor, evaluation = self.capacity_factor, self.eval_capacity_factor
        return TopK(k=2, normalise=True, capacity_factor=factor, eval_capacity_factor=evaluation, priority=self.priority)
