"""Top-k token choice: Shazeer et al. 2017, GShard, Switch, V-MoE, Mixtral, DeepSeek."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.core.fields import Count, Whole
from moejax.routing.scores import best, shares, softmax_over, take
from moejax.routing.select.base import CapacityLimited, selects


@selects.register("top_k")
@dataclasses.dataclass(frozen=True)
class TopK(CapacityLimited):
    """Each token takes the k experts with the largest logits; ties go to the lowest index.

    Attributes:
      k: experts per token.
      score: what the weights are made of. `softmax` over all experts before selection (Switch, V-MoE, OLMoE);
        `softmax_selected` over the k selected logits only (Shazeer et al. 2017, Mixtral), the same numbers as `softmax` with
        `normalise`; `sigmoid` of each logit by itself (DeepSeek-V3, Llama 4); `logit` the raw logit.
      normalise: divide the weights by their sum over the selected experts. Before drops, so a token that loses a choice gets a
        smaller output (Zoph et al. 2022), never a rescaled one.
      scale: multiplies the weights (DeepSeek's routed scaling factor).
      expert_groups: experts stand in this many groups of neighbours (devices, nodes).
      groups_kept: a token's experts all come from its best `groups_kept` groups (device- and node-limited routing of DeepSeek-V2 and
        V3); None for any.
      group_score: what ranks a group: its best expert's score ('best', V2), or the sum of its two best ('best_two', V3).
      skip: leaves out each token's `skip` best experts and takes the k next: measures, as an `eval_select`, how far the others stand
        in for them (DeepSeekMoE, section 4.5).
      apply_bias: how a balancer's bias changes a score for ranking: 'add' gives s + b, 'multiply' gives s (1 + b), which reaches nobody
        whose score is 0 (Wang et al. 2024, section 4.3, find it no better).
      constant_gate: with k=1, weights normalised over the selection are the constant 1 and the router gets no task gradient.
        That is refused unless asked for here.
      capacity_factor, eval_capacity_factor, priority: see `CapacityLimited`.
    """

    k: Count = 1
    score: Literal["softmax", "softmax_selected", "sigmoid", "logit"] = "softmax"
    normalise: bool = False
    scale: float = 1.0
    expert_groups: Count = 1
    groups_kept: Count | None = None
    group_score: Literal["best", "best_two"] = "best"
    skip: Whole = 0
    apply_bias: Literal["add", "multiply"] = "add"
    constant_gate: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.groups_kept or 1) > self.expert_groups:
            raise ConfigError(f"groups_kept={self.groups_kept} exceeds expert_groups={self.expert_groups}")
        if self.k == 1 and (self.normalise or self.score == "softmax_selected") and not self.constant_gate:
            raise ConfigError(
                "k=1 with weights normalised over the selection makes every weight 1 and gives the router no task gradient; "
                "use score='softmax' with normalise=False, or set constant_gate=True if this is intended"
            )

    def choose(
        self, logits: Float[Array, "g n e"], ctx: Context, bias: Float[Array, "e"] | None
    ) -> tuple[Int[Array, "g n k"], Bool[Array, "g n k"]]:
        # Logits rather than scores where possible: a saturated softmax rounds different logits to equal scores.
        ranking = logits if bias is None else self._biased(logits, bias)
        if self.groups_kept is not None:
            ranking = jnp.where(self._in_kept_groups(logits, bias), ranking, -jnp.inf)
        expert = best(ranking, self.k + self.skip)[..., self.skip :]
        return expert, jnp.ones(expert.shape, bool)

    def weights(
        self, logits: Float[Array, "g n e"], expert: Int[Array, "g n k"], wanted: Bool[Array, "g n k"], ctx: Context
    ) -> Float[Array, "g n k"]:
        chosen = take(logits, expert)
        match self.score, self.normalise:
            case ("softmax_selected", _) | ("softmax", True):
                weight = softmax_over(chosen, wanted)
            case "sigmoid", True:
                weight = softmax_over(jax.nn.log_sigmoid(chosen), wanted)
            case "logit", True:
                weight = shares(jnp.where(wanted, chosen, 0))
            case _:
                weight = take(self._scores(logits), expert)
        return weight * self.scale

    def token_score(self, logits: Float[Array, "g n e"]) -> Float[Array, "g n"]:
        return self._scores(logits).max(-1)

    def widest(self, num_experts: int) -> "TopK":
        return dataclasses.replace(self, k=self._reach(num_experts) - self.skip)

    def probabilities(self, logits: Float[Array, "g n e"]) -> Float[Array, "g n e"]:
        """Softmax, or sigmoids divided by their sum (DeepSeek-V3's balance loss)."""
        return jax.nn.softmax(jax.nn.log_sigmoid(logits) if self.score == "sigmoid" else logits, axis=-1)

    def check_num_experts(self, num_experts: int) -> None:
        super().check_num_experts(num_experts)
        if num_experts % self.expert_groups:
            raise ConfigError(
                f"expert_groups={self.expert_groups} does not divide num_experts={num_experts}; take groups of equal size"
            )
        reach = self._reach(num_experts)
        if self.k + self.skip > reach:
            raise ConfigError(
                f"k={self.k} and skip={self.skip} exceed the {reach} experts in a token's reach (num_experts={num_experts}, "
                f"expert_groups={self.expert_groups}, groups_kept={self.groups_kept}); lower k or skip, or keep more groups"
            )

    def _reach(self, num_experts: int) -> int:
        """How many experts a token may choose among."""
        return num_experts // self.expert_groups * (self.groups_kept or self.expert_groups)

    def _scores(self, logits: Float[Array, "g n e"]) -> Float[Array, "g n e"]:
        if self.score == "softmax":
            return jax.nn.softmax(logits, axis=-1)
        return jax.nn.sigmoid(logits) if self.score == "sigmoid" else logits

    def _biased(self, logits: Float[Array, "g n e"], bias: Float[Array, "e"]) -> Float[Array, "g n e"]:
        """Scores for ranking under a balancer's bias."""
        scores = self._scores(logits)
        return scores + bias if self.apply_bias == "add" else scores * (1 + bias)

    def _in_kept_groups(self, logits: Float[Array, "g n e"], bias: Float[Array, "e"] | None) -> Bool[Array, "g n e"]:
        """Whether an expert is in one of its token's best groups; ties go to the lowest group."""
        scores = self._scores(logits) if bias is None else self._biased(logits, bias)
        scores = scores.reshape(*logits.shape[:2], self.expert_groups, -1)
        top, _ = jax.lax.top_k(scores, min(scores.shape[-1], 1 if self.group_score == "best" else 2))
        kept = best(top.sum(-1), self.groups_kept)
        in_kept = (kept[..., None] == jnp.arange(self.expert_groups)).any(-2)
        return jnp.repeat(in_kept, scores.shape[-1], axis=-1)
