"""Top-any gating (Guo et al. 2024, DynMoE): every expert whose score passes its own learned threshold; all count alike."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.routing.plan import TokenPlan, dropless
from moejax.routing.select.base import all_valid, selects


@selects.register("top_any")
@dataclasses.dataclass(frozen=True)
class TopAny:
    """`y = 1/k sum of expert_e(x) over the k experts with score_e > threshold_e`; the router gives both, expert by expert.

    A negative score is that of an expert that does not exist now. In training a token may take no expert and then gets 0; outside,
    it takes the one with the highest score. Weights are `g_e / k` with `g_e = sign(relu(score_e - threshold_e))`, whose derivative
    passes through the sign as 1 and through the ReLU as it is: an expert that is not taken gets no gradient from that token. k passes
    none. Dropless.
    """

    causal: ClassVar[bool] = True
    per_token: ClassVar[bool] = True
    num_outputs_per_expert: ClassVar[int] = 2
    needs_key: ClassVar[bool] = False

    def __call__(
        self,
        logits: Float[Array, "g n o"],
        valid: Bool[Array, "g n"] | None = None,
        *,
        bias: Float[Array, "e"] | None = None,
        train: bool = False,
    ) -> TokenPlan:
        """The plan; see `Select`. Logits are pairs of score and threshold; a `bias` is added to the scores for passing."""
        score, threshold = split(logits)
        taken = score - threshold + (0 if bias is None else bias) > 0
        if not train:
            best = jax.nn.one_hot(score.argmax(-1), score.shape[-1], dtype=jnp.bool_) & (score >= 0)
            taken = jnp.where(taken.any(-1, keepdims=True), taken, best)
        everyone = jnp.broadcast_to(jnp.arange(score.shape[-1], dtype=jnp.int32), score.shape)
        return self._plan(score - threshold, everyone, taken, valid)

    def weigh(
        self,
        logits: Float[Array, "g n o"],
        expert: Int[Array, "g n k"],
        valid: Bool[Array, "g n"] | None = None,
        *,
        train: bool = False,
    ) -> TokenPlan:
        """The plan in which each token takes all of the given experts."""
        score, threshold = split(logits)
        return self._plan(score - threshold, expert, jnp.ones(expert.shape, bool), valid)

    def probabilities(self, logits: Float[Array, "g n o"]) -> Float[Array, "g n e"]:
        """Each score's share of their sum, over the experts that exist."""
        score = jax.nn.relu(split(logits)[0])
        return score / (score.sum(-1, keepdims=True) + 1e-20)

    def mean_experts(self, num_experts: int) -> float:
        """Half of the experts: what is taken before anything is learnt."""
        return num_experts / 2

    def _plan(
        self, margin: Float[Array, "g n e"], expert: Int[Array, "g n k"], taken: Bool[Array, "g n k"], valid: Array | None
    ) -> TokenPlan:
        num_experts = margin.shape[-1]
        margin = jnp.take_along_axis(margin, expert, axis=-1)
        k = jnp.maximum(taken.sum(-1, keepdims=True), 1)
        # A straight-through estimator: the value 1, the derivative of the margin where it is positive.
        gate = taken + jnp.where(margin > 0, margin - jax.lax.stop_gradient(margin), 0)
        used = taken & (all_valid(margin) if valid is None else valid)[..., None]
        return dropless(expert, gate / k, used, num_experts)


def split(logits: Float[Array, "g n o"]) -> tuple[Float[Array, "g n e"], Float[Array, "g n e"]]:
    """Scores and thresholds."""
    pairs = logits.reshape(*logits.shape[:-1], -1, 2)
    return pairs[..., 0], pairs[..., 1]
