"""Top-p token choice: as many experts as it takes (Huang et al. 2024, "Harder Tasks Need More Experts")."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.core.errors import ConfigError
from moejax.routing.plan import TokenPlan, dropless
from moejax.routing.select.base import all_valid, selects


@selects.register("top_p")
@dataclasses.dataclass(frozen=True)
class TopP:
    """Each token takes its most probable experts until their probabilities sum to `p`; weights are the raw probabilities.

    A peaked router uses one expert, a flat one `p * e` of them (at the start nearly all tokens). Ties go to the lowest index.
    The weights sum to between p and 1. Dropless. Without `Entropy` among the losses, routers drift to flat distributions.

    Attributes:
      p: the threshold, above 0 and below 1 (the paper: 0.4).
      max_experts: most experts of a token; the plan's static k. None for all of them.
    """

    p: float = 0.4
    max_experts: int | None = None
    causal: ClassVar[bool] = True
    per_token: ClassVar[bool] = True
    num_outputs_per_expert: ClassVar[int] = 1
    needs_key: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.p < 1:
            raise ConfigError(f"p={self.p} must lie between 0 and 1; with 1 every token would use every expert")
        if self.max_experts is not None and self.max_experts < 1:
            raise ConfigError(f"max_experts={self.max_experts} must be at least 1, or None for all")

    def __call__(
        self,
        logits: Float[Array, "g n e"],
        valid: Bool[Array, "g n"] | None = None,
        *,
        bias: Float[Array, "e"] | None = None,
        train: bool = False,
    ) -> TokenPlan:
        """The plan; see `Select`. With a `bias`, experts are tried in the order of their biased probabilities."""
        self.check_num_experts(logits.shape[-1])
        probs = self.probabilities(logits)
        _, expert = jax.lax.top_k(logits if bias is None else probs + bias, self.max_experts or logits.shape[-1])
        return self.weigh(logits, expert, valid)

    def weigh(
        self,
        logits: Float[Array, "g n e"],
        expert: Int[Array, "g n k"],
        valid: Bool[Array, "g n"] | None = None,
        *,
        train: bool = False,
    ) -> TokenPlan:
        """The plan in which each token takes the given experts, in their order, until the threshold is reached."""
        weight = jnp.take_along_axis(self.probabilities(logits), expert, axis=-1)
        before = jnp.cumsum(weight, axis=-1) - weight
        used = (before < self.p) & (all_valid(logits) if valid is None else valid)[..., None]
        return dropless(expert, weight, used, logits.shape[-1])

    def probabilities(self, logits: Float[Array, "g n e"]) -> Float[Array, "g n e"]:
        return jax.nn.softmax(logits, axis=-1)

    def check_num_experts(self, num_experts: int) -> None:
        """Raises ConfigError if a token could take more experts than there are."""
        if self.max_experts is not None and self.max_experts > num_experts:
            raise ConfigError(f"max_experts={self.max_experts} exceeds num_experts={num_experts}; lower it, or leave it None")

    def mean_experts(self, num_experts: int) -> float:
        """Experts of a token whose router is flat, which is the most that they can need."""
        return float(min(math.ceil(self.p * num_experts), self.max_experts or num_experts))
