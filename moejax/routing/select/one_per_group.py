"""One expert of each group of experts: expert prototyping, "k top-1" (M6-T, Yang et al. 2021)."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.routing.scores import best, take
from moejax.routing.select.base import CapacityLimited, selects


@selects.register("one_per_group")
@dataclasses.dataclass(frozen=True)
class OnePerGroup(CapacityLimited):
    """`y = sum_z p_z[i_z] expert_{z, i_z}(x)`, `p_z = softmax(W_z x)`, `i_z = argmax p_z`: the best expert of every group z.

    Expert prototyping, "Z top-1" (Yang et al. 2021, "M6-T: Exploring Sparse Expert Models and Beyond", arXiv 2105.15082). The e
    experts stand in `expert_groups` groups of neighbours, whose Z routers are the Z slices of one router's logits. A token's
    experts are from Z different groups, found by Z argmaxes side by side instead of Z ones after another, and as many as under
    top-k with k = Z. Weights are probabilities within a group, so that they sum to as much as Z; `scale=1/Z` makes that 1.

        rule = OnePerGroup(expert_groups=2, capacity_factor=1.25)      # "2 top-1" of M6-T; with one group, Switch
        layer = MoE(Linear(8), rule, GLU(hidden=256, num_experts=8), losses=(Balance(0.01),))

    Groups compete for nothing: `priority='choice'` is 'token', and causal. `probabilities` are the mean of the groups'
    distributions, under which `Balance` is the mean of each group's balance loss (with `count='first'`, which sees choices in the
    order of the groups, a part of the first group's only). Whoever puts all of a group's logits far down, as a router that masks
    experts may, leaves a token one of them all the same.

    Attributes:
      expert_groups: Z. Which experts form a group is part of the trained model: permute them within a group only.
      scale: multiplies the weights.
      capacity_factor: see `capacity.compute_capacity`, with k = Z: the paper's "k x" capacity, `gamma k n / e`. Its "1 x", with no
        more slots than top-1 has, is gamma / Z.
      eval_capacity_factor, priority: see `CapacityLimited`.

    Raises:
      ConfigError: `expert_groups` is less than 1, or does not divide the number of experts.
    """

    expert_groups: int = 2
    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.expert_groups < 1:
            raise ConfigError(f"expert_groups={self.expert_groups} must be at least 1: a token takes one expert of each group")

    @property
    def k(self) -> int:
        """Experts per token."""
        return self.expert_groups

    @property
    def causal(self) -> bool:
        """Choices of one expert are all of one group, and so in token order under 'choice' too."""
        return super().causal or self.priority == "choice"

    def choose(
        self, logits: Float[Array, "g n e"], ctx: Context, bias: Float[Array, "e"] | None
    ) -> tuple[Int[Array, "g n z"], Bool[Array, "g n z"]]:
        # Logits rather than probabilities where possible: a saturated softmax rounds different logits to equal ones.
        ranking = self._by_group(logits if bias is None else self._within_groups(logits) + bias)
        inside = best(ranking, 1)[..., 0]
        expert = inside + ranking.shape[-1] * jnp.arange(self.expert_groups, dtype=inside.dtype)
        return expert, jnp.ones(expert.shape, bool)

    def weights(
        self, logits: Float[Array, "g n e"], expert: Int[Array, "g n k"], wanted: Bool[Array, "g n k"], ctx: Context
    ) -> Float[Array, "g n k"]:
        return self.scale * take(self._within_groups(logits), expert)

    def probabilities(self, logits: Float[Array, "g n e"]) -> Float[Array, "g n e"]:
        """The mean of the groups' distributions: each token's share of every expert, were groups drawn evenly."""
        return self._within_groups(logits) / self.expert_groups

    def check_num_experts(self, num_experts: int) -> None:
        if num_experts % self.expert_groups:
            raise ConfigError(
                f"expert_groups={self.expert_groups} does not divide num_experts={num_experts}; take groups of equal size"
            )

    def _by_group(self, values: Float[Array, "g n e"]) -> Float[Array, "g n z i"]:
        return values.reshape(*values.shape[:2], self.expert_groups, -1)

    def _within_groups(self, logits: Float[Array, "g n e"]) -> Float[Array, "g n e"]:
        """p_z of every group, side by side; they sum to Z."""
        return jax.nn.softmax(self._by_group(logits), axis=-1).reshape(logits.shape)
