"""Balancing without gradients: a bias on each expert's selection that follows the load.

The bias changes who is selected and never a weight. It moves after an optimizer step, by the choices that were counted in it, so it
looks at past batches only: it is causal, and pulls no gradient through the router. It lives in the collection 'router_state'. A
balancer is a controller; see `moejax.core.control`.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from moejax.core.control import Controller, Site
from moejax.core.fields import NonNegative
from moejax.core.registry import Registry
from moejax.routing.losses.base import Routing

balancers = Registry("balancer", "moejax.routing.balancers")

STATE = "selection_bias"  # its name in a layer's 'router_state': float32[e], added to the scores for ranking


class Balancer(Controller):
    """A frozen dataclass: configuration without state. Its `after_step` moves `site.state['selection_bias']`."""

    def measure(self, routing: Routing) -> dict[str, Array]:
        """Sums over the valid tokens of a call, for `after_step`: how many choices, before drops, each expert got."""
        wanted = jax.lax.stop_gradient(routing.plan.wanted())
        return {"choices": jnp.where(routing.valid[..., None], wanted, 0).sum((0, 1)).astype(jnp.int32)}

    def after_step(self, site: Site) -> Site:
        raise NotImplementedError(f"{type(self).__name__} needs after_step(site), which moves site.state['{STATE}']")


@balancers.register("loss_free")
@dataclasses.dataclass(frozen=True)
class LossFree(Balancer):
    """`b_i += speed * sign(mean choices - choices_i)` (Wang et al. 2024, algorithm 1; DeepSeek-V3).

    Choices are counted before drops, of valid tokens, over all microbatches and devices of a step. Whole numbers are compared, so an
    expert exactly at the mean stays. Elsewhere the sign rule never rests: at balance it dithers by `speed`.

    Attributes:
      speed: u, the size of a step: 1e-3 for long training; a few thousand steps need 1e-2.
      rule: 'sign', or 'proportional' to the distance from the mean, as a share of the mean (the paper's variant).
    """

    speed: NonNegative = 1e-3
    rule: Literal["sign", "proportional"] = "sign"

    def after_step(self, site: Site) -> Site:
        choices: Int[Array, "e"] = site.measured["choices"]
        lack = choices.sum() - choices.shape[0] * choices  # e times the distance from the mean, in whole numbers
        step = jnp.sign(lack) if self.rule == "sign" else lack / jnp.maximum(choices.sum(), 1)
        return site.replace(state={**site.state, STATE: site.state[STATE] + self.speed * step})
