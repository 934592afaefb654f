"""Null experts (Zeng et al. 2024, AdaMoE): a token may spend its choices on experts that do nothing, and so takes fewer."""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.core.errors import ConfigError, check_choice
from moejax.routing.plan import TokenPlan, dropless
from moejax.routing.select.base import all_valid, selects

NORMALISE = ("true", "selected", "none")


@selects.register("null_experts")
@dataclasses.dataclass(frozen=True)
class NullExperts:
    """Top-k of e true experts and `num_null` null ones, whose output is 0 and which cost nothing.

    The router gives e + num_null logits; p is their softmax. Weights are `p_i` divided by the sum of p over the chosen true
    experts. A token takes between 0 and k true experts, `k e / (e + num_null)` of them on average under a uniform load; one that
    takes none gets exactly 0. Ties go to the lowest index, so to true experts. Dropless.

    Attributes:
      k: choices of a token, null ones included.
      num_null: number of null experts.
      normalise: weights sum to 1 over the chosen 'true' experts (the paper), over all 'selected' ones with the null ones'
        shares lost, or are the raw probabilities ('none').
    """

    k: int = 4
    num_null: int = 8
    normalise: Literal["true", "selected", "none"] = "true"
    causal: ClassVar[bool] = True
    per_token: ClassVar[bool] = True
    num_outputs_per_expert: ClassVar[int] = 1
    needs_key: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(f"k={self.k} must be at least 1")
        if self.num_null < 1:
            raise ConfigError(f"num_null={self.num_null} must be at least 1; without null experts the rule is 'top_k'")
        check_choice("normalise", self.normalise, NORMALISE)

    def __call__(
        self,
        logits: Float[Array, "g n o"],
        valid: Bool[Array, "g n"] | None = None,
        *,
        bias: Float[Array, "e"] | None = None,
        train: bool = False,
    ) -> TokenPlan:
        """The plan; see `Select`. A `bias` is for true experts only."""
        self.check_num_experts(logits.shape[-1] - self.num_null)
        ranking = logits if bias is None else jax.nn.softmax(logits, axis=-1) + jnp.pad(bias, (0, self.num_null))
        return self.weigh(logits, jax.lax.top_k(ranking, self.k)[1], valid)

    def weigh(
        self,
        logits: Float[Array, "g n o"],
        expert: Int[Array, "g n k"],
        valid: Bool[Array, "g n"] | None = None,
        *,
        train: bool = False,
    ) -> TokenPlan:
        """The plan in which each token takes the given experts; indices from e on are null experts."""
        num_experts = logits.shape[-1] - self.num_null
        weight = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), expert, axis=-1)
        true = expert < num_experts
        if self.normalise != "none":
            counted = jnp.where(true, weight, 0) if self.normalise == "true" else weight
            total = counted.sum(-1, keepdims=True)
            weight = weight / jnp.where(total > 0, total, 1)
        used = true & (all_valid(logits) if valid is None else valid)[..., None]
        expert = jnp.minimum(expert, num_experts - 1).astype(jnp.int32)
        return dropless(expert, jnp.where(true, weight, 0), used, num_experts)

    def probabilities(self, logits: Float[Array, "g n o"]) -> Float[Array, "g n e"]:
        """Probabilities of the true experts; what their sum lacks to 1 is the null experts'."""
        return jax.nn.softmax(logits, axis=-1)[..., : -self.num_null]

    def check_num_experts(self, num_experts: int) -> None:
        """Raises ConfigError if there are fewer true and null experts than choices."""
        if self.k > num_experts + self.num_null:
            raise ConfigError(
                f"k={self.k} exceeds num_experts={num_experts} and num_null={self.num_null} together; lower k or add experts"
            )

    def mean_experts(self, num_experts: int) -> float:
        """True experts of a token under a uniform load."""
        return min(self.k * num_experts / (num_experts + self.num_null), float(num_experts))
