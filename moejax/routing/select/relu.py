"""ReLU routing (Wang et al. 2024, ReMoE): every expert whose gate is above 0, weighted by that gate; differentiable everywhere."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.core.errors import ConfigError
from moejax.routing.plan import TokenPlan, dropless
from moejax.routing.select.base import all_valid, selects


@selects.register("relu")
@dataclasses.dataclass(frozen=True)
class ReLU:
    """`y = sum of relu(logit_e) expert_e(x)`: no softmax, no top-k, no normalisation.

    A gate reaches 0 exactly where its expert switches off, so the gradient is the true one. The number of experts differs from
    token to token and is about half of them at the start: the loss `adaptive_l1` brings it down to `k` on average. Dropless.

    Attributes:
      k: experts per token that training aims at, for counting active parameters; give the loss the same number.
      max_experts: most experts of a token, the largest gates first; None for all of them, as in the paper.
    """

    k: float = 1.0
    max_experts: int | None = None
    causal: ClassVar[bool] = True
    per_token: ClassVar[bool] = True
    num_outputs_per_expert: ClassVar[int] = 1
    needs_key: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.k <= 0:
            raise ConfigError(f"k={self.k} must be positive")
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
        """The plan; see `Select`. A `bias` says who comes first where `max_experts` is less than all."""
        e = logits.shape[-1]
        self.check_num_experts(e)
        if self.max_experts is None:
            return self.weigh(logits, jnp.broadcast_to(jnp.arange(e), logits.shape), valid)
        return self.weigh(logits, jax.lax.top_k(logits if bias is None else logits + bias, self.max_experts)[1], valid)

    def weigh(
        self,
        logits: Float[Array, "g n e"],
        expert: Int[Array, "g n k"],
        valid: Bool[Array, "g n"] | None = None,
        *,
        train: bool = False,
    ) -> TokenPlan:
        """The plan in which each token takes those of the given experts whose gates are above 0."""
        weight = jax.nn.relu(jnp.take_along_axis(logits, expert, axis=-1))
        used = (weight > 0) & (all_valid(logits) if valid is None else valid)[..., None]
        return dropless(expert, weight, used, logits.shape[-1])

    def probabilities(self, logits: Float[Array, "g n e"]) -> Float[Array, "g n e"]:
        """Each gate's share of their sum; all 0 for a token that takes no expert."""
        gates = jax.nn.relu(logits)
        total = gates.sum(-1, keepdims=True)
        return gates / jnp.where(total > 0, total, 1)

    def check_num_experts(self, num_experts: int) -> None:
        """Raises ConfigError if tokens are to take more experts than there are."""
        for name in ("k", "max_experts"):
            value = getattr(self, name)
            if value is not None and value > num_experts:
                raise ConfigError(f"{name}={value} exceeds num_experts={num_experts}; lower it or add experts")

    def mean_experts(self, num_experts: int) -> float:
        """Experts of a token once the sparsity has settled."""
        return float(self.k)
