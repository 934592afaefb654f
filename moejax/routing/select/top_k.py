"""Top-k token choice: Shazeer et al. 2017, GShard, Switch, V-MoE, Mixtral, DeepSeek."""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.core.errors import ConfigError, check_choice
from moejax.routing.capacity import PRIORITIES, Priority, drop_over_capacity
from moejax.routing.plan import TokenPlan, dropless
from moejax.routing.select.base import all_valid, probabilities, selects

SCORES = ("softmax", "softmax_selected", "sigmoid", "logit")


@selects.register("top_k")
@dataclasses.dataclass(frozen=True)
class TopK:
    """Each token takes the k experts with the largest logits; ties go to the lowest index.

    Attributes:
      k: experts per token.
      score: what the weights are made of. `softmax` over all experts before selection (Switch, V-MoE, OLMoE);
        `softmax_selected` over the k selected logits only (Shazeer et al. 2017, Mixtral), the same numbers as `softmax` with
        `normalise`; `sigmoid` of each logit by itself (DeepSeek-V3, Llama 4); `logit` the raw logit.
      normalise: divide the weights by their sum over the selected experts. Before drops, so a token that loses a choice gets a
        smaller output (Zoph et al. 2022), never a rescaled one.
      capacity_factor: see `capacity.compute_capacity`; None is dropless.
      eval_capacity_factor: the factor outside training; 'same' by default, since another one changes the function.
      priority: who is served first when experts fill up; see `capacity.drop_over_capacity`.
      scale: multiplies the weights (DeepSeek's routed scaling factor).
      groups: experts stand in this many groups of neighbours (devices, nodes).
      groups_kept: a token's experts all come from its best `groups_kept` groups (device- and node-limited routing of DeepSeek-V2 and
        V3); None for any.
      group_score: what ranks a group: its best expert's score ('best', V2), or the sum of its two best ('best_two', V3).
      skip: leaves out each token's `skip` best experts and takes the k next: measures, as an `eval_select`, how far the others stand
        in for them (DeepSeekMoE, section 4.5).
      bias: how a balancer's bias changes a score for ranking: 'add' gives s + b, 'multiply' gives s (1 + b), which reaches nobody whose
        score is 0 (Wang et al. 2024, section 4.3, find it no better).
      constant_gate: with k=1, weights normalised over the selection are the constant 1 and the router gets no task gradient.
        That is refused unless asked for here.
    """

    k: int = 1
    score: Literal["softmax", "softmax_selected", "sigmoid", "logit"] = "softmax"
    normalise: bool = False
    capacity_factor: float | None = None
    eval_capacity_factor: float | None | Literal["same"] = "same"
    priority: Priority = "token"
    scale: float = 1.0
    groups: int = 1
    groups_kept: int | None = None
    group_score: Literal["best", "best_two"] = "best"
    skip: int = 0
    bias: Literal["add", "multiply"] = "add"
    constant_gate: bool = False
    num_outputs_per_expert: ClassVar[int] = 1
    needs_key: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_choice("score", self.score, SCORES)
        if self.k < 1:
            raise ConfigError(f"k={self.k} must be at least 1")
        if self.skip < 0:
            raise ConfigError(f"skip={self.skip} must not be negative")
        check_choice("bias", self.bias, ("add", "multiply"))
        check_choice("group_score", self.group_score, ("best", "best_two"))
        if self.groups < 1 or not 1 <= (self.groups_kept or 1) <= self.groups:
            raise ConfigError(f"groups_kept={self.groups_kept} must lie between 1 and groups={self.groups}")
        check_choice("priority", self.priority, PRIORITIES)
        for name in ("capacity_factor", "eval_capacity_factor"):
            value = getattr(self, name)
            if value not in (None, "same") and value <= 0:
                raise ConfigError(f"{name}={value} must be positive, or None for dropless routing")
        if self.k == 1 and (self.normalise or self.score == "softmax_selected") and not self.constant_gate:
            raise ConfigError(
                "k=1 with weights normalised over the selection makes every weight 1 and gives the router no task gradient; "
                "use score='softmax' with normalise=False, or set constant_gate=True if this is intended"
            )

    @property
    def causal(self) -> bool:
        return (
            all(f is None for f in self._factors()) or self.priority == "token" or (self.priority == "choice" and self.k == 1)
        )

    @property
    def per_token(self) -> bool:
        return self._factor(train=False) is None

    def __call__(
        self,
        logits: Float[Array, "g n e"],
        valid: Bool[Array, "g n"] | None = None,
        *,
        bias: Float[Array, "e"] | None = None,
        train: bool = False,
    ) -> TokenPlan:
        """The plan; see `Select`. Raises ConfigError when k exceeds the number of experts."""
        e = logits.shape[-1]
        self.check_num_experts(e)
        # Logits rather than scores where possible: a saturated softmax rounds different logits to equal scores.
        ranking = logits if bias is None else self._biased(logits, bias)
        if self.groups_kept is not None:
            ranking = jnp.where(self._in_kept_groups(logits, bias), ranking, -jnp.inf)
        _, expert = jax.lax.top_k(ranking, self.k + self.skip)
        return self.weigh(logits, expert[..., self.skip :], valid, train=train)

    def weigh(
        self,
        logits: Float[Array, "g n e"],
        expert: Int[Array, "g n k"],
        valid: Bool[Array, "g n"] | None = None,
        *,
        train: bool = False,
    ) -> TokenPlan:
        """The plan in which each token takes the given experts, with the weights and drops that this rule gives them."""
        scores = self._scores(logits)
        weight = jnp.take_along_axis(scores, expert, axis=-1)
        if self.score == "softmax_selected":
            weight = jax.nn.softmax(weight, axis=-1)
        if self.normalise:
            weight = weight / (weight.sum(-1, keepdims=True) + 1e-20)
        used = jnp.broadcast_to((all_valid(logits) if valid is None else valid)[..., None], expert.shape)
        plan = dropless(expert, weight * self.scale, used, logits.shape[-1])
        factor = self._factor(train)
        if factor is None:
            return plan
        return drop_over_capacity(plan, valid, factor, self.priority, score=scores.max(-1))

    def probabilities(self, logits: Float[Array, "g n e"]) -> Float[Array, "g n e"]:
        return probabilities(logits, self.score)

    def check_num_experts(self, num_experts: int) -> None:
        """Raises ConfigError if there are fewer experts than choices."""
        if self.k > num_experts:
            raise ConfigError(f"k={self.k} exceeds num_experts={num_experts}; lower k or add experts")
        if num_experts % self.groups:
            raise ConfigError(f"groups={self.groups} does not divide num_experts={num_experts}; take groups of equal size")
        within_reach = num_experts // self.groups * (self.groups_kept or self.groups)
        if self.k + self.skip > within_reach:
            raise ConfigError(
                f"k={self.k} and skip={self.skip} exceed the {within_reach} experts in a token's reach (num_experts={num_experts}, "
                f"groups={self.groups}, groups_kept={self.groups_kept}); lower k or skip, or keep more groups"
            )

    def mean_experts(self, num_experts: int) -> float:
        """Experts per token."""
        return float(self.k)

    def _scores(self, logits: Float[Array, "g n e"]) -> Float[Array, "g n e"]:
        if self.score == "softmax":
            return jax.nn.softmax(logits, axis=-1)
        return jax.nn.sigmoid(logits) if self.score == "sigmoid" else logits

    def _biased(self, logits: Float[Array, "g n e"], bias: Float[Array, "e"]) -> Float[Array, "g n e"]:
        """Scores for ranking under a balancer's bias."""
        scores = self._scores(logits)
        return scores + bias if self.bias == "add" else scores * (1 + bias)

    def _in_kept_groups(self, logits: Float[Array, "g n e"], bias: Float[Array, "e"] | None) -> Bool[Array, "g n e"]:
        """Whether an expert is in one of its token's best groups; ties go to the lowest group."""
        scores = self._scores(logits) if bias is None else self._biased(logits, bias)
        scores = scores.reshape(*logits.shape[:2], self.groups, -1)
        best, _ = jax.lax.top_k(scores, min(scores.shape[-1], 1 if self.group_score == "best" else 2))
        _, kept = jax.lax.top_k(best.sum(-1), self.groups_kept)
        in_kept = (kept[..., None] == jnp.arange(self.groups)).any(-2)
        return jnp.repeat(in_kept, scores.shape[-1], axis=-1)

    def _factor(self, train: bool) -> float | None:
        return self.capacity_factor if train or self.eval_capacity_factor == "same" else self.eval_capacity_factor

    def _factors(self) -> tuple[float | None, float | None]:
        return self._factor(True), self._factor(False)
