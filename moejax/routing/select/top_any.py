"""Top-any gating (Guo et al. 2024, DynMoE): every expert whose score passes its own learned threshold; all count alike."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.core.context import Context
from moejax.routing.scores import shares, take
from moejax.routing.select.base import TokenChoice, selects


@selects.register("top_any")
@dataclasses.dataclass(frozen=True)
class TopAny(TokenChoice):
    """`y = 1/k sum of expert_e(x) over the k experts with score_e > threshold_e`; the router gives both, expert by expert.

    A negative score is that of an expert that does not exist now. In training a token may take no expert and then gets 0; outside,
    it takes the one with the highest score. Weights are `g_e / k` with `g_e = sign(relu(score_e - threshold_e))`, whose derivative
    passes through the sign as 1 and through the ReLU as it is: an expert that is not taken gets no gradient from that token. k passes
    none. Dropless. A balancer's bias is added to the scores for passing.
    """

    causal: ClassVar[bool] = True
    per_token: ClassVar[bool] = True
    outputs_per_expert: ClassVar[int] = 2

    def choose(
        self, logits: Float[Array, "g n o"], ctx: Context, bias: Float[Array, "e"] | None
    ) -> tuple[Int[Array, "g n e"], Bool[Array, "g n e"]]:
        score, threshold = split(logits)
        taken = score - threshold + (0 if bias is None else bias) > 0
        if not ctx.train:
            highest = jax.nn.one_hot(score.argmax(-1), score.shape[-1], dtype=jnp.bool_) & (score >= 0)
            taken = jnp.where(taken.any(-1, keepdims=True), taken, highest)
        return jnp.broadcast_to(jnp.arange(score.shape[-1], dtype=jnp.int32), score.shape), taken

    def weights(
        self, logits: Float[Array, "g n o"], expert: Int[Array, "g n k"], wanted: Bool[Array, "g n k"], ctx: Context
    ) -> Float[Array, "g n k"]:
        score, threshold = split(logits)
        margin = take(score - threshold, expert)
        # A straight-through estimator: the value 1, the derivative of the margin where it is positive.
        gate = wanted + jnp.where(margin > 0, margin - jax.lax.stop_gradient(margin), 0)
        return gate / jnp.maximum(wanted.sum(-1, keepdims=True), 1)

    def probabilities(self, logits: Float[Array, "g n o"]) -> Float[Array, "g n e"]:
        """Each score's share of their sum, over the experts that exist."""
        return shares(jax.nn.relu(split(logits)[0]))

    def mean_experts(self, num_experts: int) -> float:
        """Half of the experts: what is taken before anything is learnt."""
        return num_experts / 2


def split(logits: Float[Array, "g n o"]) -> tuple[Float[Array, "g n e"], Float[Array, "g n e"]]:
    """Scores and thresholds."""
    pairs = logits.reshape(*logits.shape[:-1], -1, 2)
    return pairs[..., 0], pairs[..., 1]
