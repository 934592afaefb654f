"""Losses whose weight follows what routing does: ReMoE's adaptive L1 (Wang et al. 2024)."""

import dataclasses
from typing import Annotated, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.core.control import Site
from moejax.core.fields import In, Positive
from moejax.routing.losses.base import Loss, Routing, batch_mean, losses


@runtime_checkable
class AdaptiveLoss(Protocol):
    """A `Loss` with one number of state, kept in the layer's 'router_state', and a controller that changes it once per step.

    Its `coef` is that of the start.
    """

    coef: float

    def fresh_state(self) -> Float[Array, ""]:
        """The state at the start."""
        ...

    def measure(self, routing: Routing) -> dict[str, Array]:
        """Sums over the valid tokens, for `after_step`."""
        ...

    def after_step(self, site: Site) -> Site:
        """See `moejax.core.control.Controller`."""
        ...

    def __call__(self, routing: Routing, state: Float[Array, ""]) -> Float[Array, ""]: ...


@losses.register("adaptive_l1")
@dataclasses.dataclass(frozen=True)
class AdaptiveL1(Loss):
    """`lambda * sum_e f_e mean_t R_te` of ReLU gates R, with a lambda that drives the mean number of active experts to `k`.

    `f_e = e / k * mean_t 1[R_te > 0]`, without gradient, presses more on experts that are busier than `k / e`; f = 1 is plain L1.
    After every optimizer step lambda is multiplied by `rate` if more than `k / e` of all gates were active (over all layers of
    equal settings, tokens, experts, microbatches and devices), and divided by it otherwise. So the mean is controlled, and
    neither a token's nor a layer's own number: a layer may go dead. Lambda is float32 and has no gradient.

    Attributes:
      k: experts per token to aim at.
      coef: lambda at the start (the paper: 1e-8, which takes about 100 steps to bite; short runs want 1e-4).
      rate: a, the factor of one step (the paper: 1.2).
      balanced: press by load; False is the paper's ablation.
    """

    k: Positive = 1.0
    coef: Positive = dataclasses.field(default=1e-8, kw_only=True)
    rate: Annotated[float, In(above=1)] = 1.2
    balanced: bool = True

    def fresh_state(self) -> Float[Array, ""]:
        return jnp.float32(self.coef)

    def measure(self, routing: Routing) -> dict[str, Array]:
        return {"active": routing.plan.wanted().sum(), "tokens": routing.valid.sum().astype(jnp.float32)}

    def after_step(self, site: Site) -> Site:
        too_many = site.everywhere["active"] > self.k * site.everywhere["tokens"]
        value = site.state["adaptive_l1"] * jnp.where(too_many, self.rate, 1 / self.rate)
        return site.replace(state={**site.state, "adaptive_l1": value})

    def __call__(self, routing: Routing, state: Float[Array, ""]) -> Float[Array, ""]:
        gates, active = routing.plan.dense(), jax.lax.stop_gradient(routing.plan.wanted())
        mean = batch_mean(gates, routing.valid)
        if self.balanced:
            mean = mean * batch_mean(active, routing.valid) * (routing.plan.num_experts / self.k)
        return state * mean.sum()
