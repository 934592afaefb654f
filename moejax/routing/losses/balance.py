"""The balance loss of Switch, GShard, Mixtral, OLMoE."""

import dataclasses
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.core.errors import ConfigError
from moejax.core.sowing import batch_sum
from moejax.routing.losses.base import Loss, Routing, batch_mean, losses, masked_mean, mean_of_groups
from moejax.routing.plan import Plan, TokenPlan


@losses.register("balance")
@dataclasses.dataclass(frozen=True)
class Balance(Loss):
    """`coef * e * sum_i f_i P_i`: f is the share of choices that want expert i, P its mean probability (Fedus et al. 2021, eq. 4).

    f counts what tokens want before capacity, sums to 1, and passes no gradient.

    Attributes:
      coef: weight; may be negative.
      count: 'all' choices (OLMoE, Mixtral up to their factor k), or only the 'first' (GShard, ST-MoE).
      over: 'group' averages f and P inside each group and then over groups, which is the same however a batch is cut into
        microbatches as long as groups stay whole; 'batch' averages over all
        tokens of the batch first, those of other microbatches too; 'layers' over all layers as well, and there is one loss for the
        network (the form of transformers, which is k times this one). Each layer adds what it changes: the sum over layers is the loss.
      share: f as a share of all 'choices', or of all 'tokens', for rules under which the number of choices varies: a token with
        three experts then counts three times, and uniform routing costs `coef` times the mean number of experts (Huang et al. 2024).
    """

    coef: float = 0.01
    count: Literal["all", "first"] = "all"
    over: Literal["group", "batch", "layers"] = "group"
    share: Literal["choices", "tokens"] = "choices"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.over == "layers" and self.count != "all":
            raise ConfigError(f"losses.balance.count='{self.count}' does not go with over='layers', which counts all choices")

    @property
    def over_layers(self) -> bool:
        return self.over == "layers"

    def cost(self, routing: Routing) -> Float[Array, ""]:
        if self.over_layers:
            return self._over_layers(routing)
        wanted = _first(routing.plan) if self.count == "first" else routing.plan.wanted()
        wanted = jax.lax.stop_gradient(wanted)
        wanted = jnp.where(routing.valid[..., None], wanted, 0)
        batch = self.over == "batch"
        mean = batch_mean if batch else partial(masked_mean, axes=(1,))
        if self.share == "tokens":
            share = mean(wanted, routing.valid)
        else:
            choices = batch_sum(wanted.sum((0, 1))) if batch else wanted.sum(1)
            share = choices / jnp.maximum(choices.sum(-1, keepdims=True), 1e-9)
        unevenness = self._unevenness(share, mean(routing.probs, routing.valid))
        return unevenness if batch else mean_of_groups(unevenness, routing.valid)

    def _over_layers(self, routing: Routing) -> Float[Array, ""]:
        if routing.earlier is None:
            raise ConfigError("losses.balance.over='layers' needs a layer that knows those below it: 'moe'; take over='batch'")

        def loss(wanted: Array, probs: Array, layers: Array) -> Array:
            """Of all layers so far; 0 of none."""
            count = wanted.sum(-1, keepdims=True) if self.share == "choices" else layers
            share = batch_mean(wanted, routing.valid) / jnp.maximum(batch_mean(count, routing.valid), 1e-9)
            return self._unevenness(
                share, batch_mean(probs, routing.valid) / jnp.maximum(batch_mean(layers, routing.valid), 1e-9)
            )

        return loss(*routing.so_far()) - loss(*routing.earlier)

    def _unevenness(self, share: Float[Array, "*g e"], mean_prob: Float[Array, "*g e"]) -> Float[Array, "*g"]:
        return share.shape[-1] * (share * mean_prob).sum(-1)


def _first(plan: Plan) -> Float[Array, "g n e"]:
    if not isinstance(plan, TokenPlan):
        raise ConfigError(f"losses.balance.count='first' needs token choice, not {type(plan).__name__}; use count='all'")
    one_hot = jax.nn.one_hot(plan.expert[..., 0], plan.num_experts, dtype=jnp.float32)
    return one_hot * (plan.used | plan.dropped)[..., :1]
