"""The loss of DynMoE's released models (Guo et al. 2024)."""

import dataclasses

import jax
from jaxtyping import Array, Float

from moejax.core.errors import ConfigError
from moejax.routing.losses.base import Routing, losses, masked_mean


@losses.register("top_any")
@dataclasses.dataclass(frozen=True)
class TopAnyLoss:
    """`coef * (balance * e^2 mean_e(mean_t(g_te / k_t) mean_t g_te) + efficiency * mean g)` over the tokens that take an expert.

    Of the released vision-language models, not of the paper: presses on busy experts and on the number of experts. The gradient
    goes through both factors by the straight-through estimator.
    """

    coef: float = 0.01
    balance: float = 1.0
    efficiency: float = 1.0

    def __post_init__(self) -> None:
        if self.balance < 0 or self.efficiency < 0:
            raise ConfigError(f"balance={self.balance} and efficiency={self.efficiency} must not be negative")

    def __call__(self, routing: Routing) -> Float[Array, ""]:
        e = routing.plan.num_experts
        share = routing.plan.dense()
        k = jax.lax.stop_gradient(routing.plan.assigned()).sum(-1, keepdims=True)
        some = routing.valid & (k[..., 0] > 0)
        gate = masked_mean(share * k, some, (0, 1))
        balance = e**2 * (masked_mean(share, some, (0, 1)) * gate).mean()
        return self.coef * (self.balance * balance + self.efficiency * gate.mean())
