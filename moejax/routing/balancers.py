"""Balancing without gradients: a bias on each expert's selection that follows the load of past batches.

The bias changes who is selected and never a weight. It looks at past batches only, so it is causal, and it pulls no gradient
through the router. It lives in the collection `router_state`:

    selection_bias[e]   the bias that the last update left
    load[e]             choices of each expert per token of the last training batch, not yet answered

An update answers the load of the batch before: the bias in use is `bias + step(load)`. So microbatches of one optimizer step,
which start from the same state and whose new states are averaged, all use one bias, and together count one batch.
"""

import dataclasses
from typing import Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.core.errors import ConfigError, check_choice
from moejax.core.registry import Registry
from moejax.routing.losses.base import Routing, masked_mean

balancers = Registry("balancer", "moejax.routing.balancers")


BalanceState = dict[str, Float[Array, "e"]]


def fresh_state(num_experts: int) -> BalanceState:
    """No bias, and nothing counted yet."""
    return {"selection_bias": jnp.zeros(num_experts), "load": jnp.zeros(num_experts)}


@runtime_checkable
class Balancer(Protocol):
    """A frozen dataclass: configuration without state."""

    def bias(self, state: BalanceState) -> Float[Array, "e"]:
        """What is added to the scores for ranking."""
        ...

    def update(self, state: BalanceState, routing: Routing) -> BalanceState:
        """The state after a training batch (or microbatch)."""
        ...


@balancers.register("loss_free")
@dataclasses.dataclass(frozen=True)
class LossFree:
    """`b_i += speed * sign(mean load - load_i)` (Wang et al. 2024, algorithm 1; DeepSeek-V3).

    Loads are choices before drops, of valid tokens. The sign rule never rests: at balance it dithers by `speed`.

    Attributes:
      speed: u, the size of a step: 1e-3 for long training; a few thousand steps need 1e-2.
      rule: 'sign', or 'proportional' to the load's distance from its mean, as a share of the mean (the paper's variant).
    """

    speed: float = 1e-3
    rule: Literal["sign", "proportional"] = "sign"

    def __post_init__(self) -> None:
        check_choice("rule", self.rule, ("sign", "proportional"))
        if self.speed < 0:
            raise ConfigError(f"speed={self.speed} must not be negative: it would feed the busiest expert")

    def bias(self, state: BalanceState) -> Float[Array, "e"]:
        mean = state["load"].mean()
        lack = mean - state["load"]
        step = jnp.sign(lack) if self.rule == "sign" else lack / jnp.maximum(mean, 1e-9)
        return jax.lax.stop_gradient(state["selection_bias"] + self.speed * step)

    def update(self, state: BalanceState, routing: Routing) -> BalanceState:
        # A share and not a count, since the states of microbatches are averaged by their numbers of tokens.
        load = masked_mean(jax.lax.stop_gradient(routing.plan.wanted()).astype(jnp.float32), routing.valid, (0, 1))
        return {"selection_bias": self.bias(state), "load": load}
