"""The select rule: a pure function from logits to a plan, and the registry of its kinds."""

from typing import ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moejax.core.registry import Registry
from moejax.routing.plan import Plan

selects = Registry("select", "moejax.routing.select")


@runtime_checkable
class Select(Protocol):
    """What every select rule offers. Rules are frozen dataclasses: configuration without state.

    Attributes:
      causal: whether a token's plan never depends on later tokens of its group.
      per_token: whether a token's plan depends on that token alone, so that decoding one token at a time gives the same plan.
      num_outputs_per_expert: logits of each expert.
      needs_key: whether the rule draws at random in training; it then takes one more keyword argument, `key`.

    A rule that lets tokens choose nothing also has `num_null`, its number of null experts; see `num_outputs`.
    """

    causal: bool
    per_token: bool
    num_outputs_per_expert: ClassVar[int] = 1
    needs_key: ClassVar[bool] = False

    def __call__(
        self,
        logits: Float[Array, "g n e"],
        valid: Bool[Array, "g n"] | None = None,
        *,
        bias: Float[Array, "e"] | None = None,
        train: bool = False,
    ) -> Plan:
        """The plan for `logits`. Invalid tokens get no used entry. `bias` is added for ranking only, never to weights."""
        ...

    def probabilities(self, logits: Float[Array, "g n e"]) -> Float[Array, "g n e"]:
        """Each token's distribution over experts, rows summing to 1: what balance losses and entropies are about."""
        ...

    def mean_experts(self, num_experts: int) -> float:
        """How many experts process a token on average, before drops: for counting active parameters."""
        ...


def num_outputs(select: Select, num_experts: int) -> int:
    """How many logits a token `select` reads: its share for each expert, then one for each null expert, where it has any."""
    return select.num_outputs_per_expert * num_experts + getattr(select, "num_null", 0)


def probabilities(logits: Float[Array, "*b e"], score: str) -> Float[Array, "*b e"]:
    """Scores as a distribution over experts: softmax, or sigmoids divided by their sum (DeepSeek-V3's balance loss)."""
    if score == "sigmoid":
        gates = jax.nn.sigmoid(logits)
        return gates / (gates.sum(-1, keepdims=True) + 1e-20)
    return jax.nn.softmax(logits, axis=-1)


def all_valid(logits: Float[Array, "g n e"]) -> Bool[Array, "g n"]:
    return jnp.ones(logits.shape[:2], jnp.bool_)
