"""Two experts per token, the second one only with some probability: GShard (Lepikhin et al. 2020, algorithm 1) and ST-MoE (Zoph et
al. 2022, section 2)."""

import dataclasses
from typing import Annotated, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.core.fields import In, Positive
from moejax.routing.capacity import Priority
from moejax.routing.scores import best, softmax_over, take
from moejax.routing.select.base import CapacityLimited, selects


@selects.register("gshard")
@dataclasses.dataclass(frozen=True)
class GShard(CapacityLimited):
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

    capacity_factor: Positive | None = 1.0
    eval_capacity_factor: Positive | None | Literal["same"] = "same"
    threshold: Annotated[float, In(above=0, most=0.5)] = 0.5
    priority: Priority = dataclasses.field(default="choice", kw_only=True)
    needs: ClassVar[tuple[str, ...]] = ("key",)

    def choose(
        self, logits: Float[Array, "g n e"], ctx: Context, bias: Float[Array, "e"] | None
    ) -> tuple[Int[Array, "g n 2"], Bool[Array, "g n 2"]]:
        expert = best(logits if bias is None else jax.nn.softmax(logits, axis=-1) + bias, 2)
        wanted = jnp.ones(expert.shape, bool)
        if ctx.train:
            second = self.weights(logits, expert, wanted, ctx)[..., 1]
            drawn = second / self.threshold > jax.random.uniform(ctx.key, second.shape)
            wanted = wanted.at[..., 1].set(drawn)
        return expert, wanted

    def weights(
        self, logits: Float[Array, "g n e"], expert: Int[Array, "g n k"], wanted: Bool[Array, "g n k"], ctx: Context
    ) -> Float[Array, "g n k"]:
        """Both gates, whether or not the second expert was drawn."""
        return softmax_over(take(logits, expert), jnp.ones(expert.shape, bool))

    def mean_experts(self, num_experts: int) -> float:
        """Experts per token outside training; at most that in training."""
        return 2.0

    def check_num_experts(self, num_experts: int) -> None:
        if num_experts < 2:
            raise ConfigError(f"k=2 exceeds num_experts={num_experts}; add experts")
