"""Losses on routing: pure functions of a layer's `Routing`, weighted by their own `coef` and sown once by the layer.

Published balance losses differ by a factor of k and in what they average over. Here both are explicit, and the scale is fixed:
the balance loss is `coef` times 1 under uniform routing and `coef` times e when one expert takes everything, for every k.
"""

import dataclasses
from typing import Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from moejax.errors import ConfigError, check_choice
from moejax.registry import Registry
from moejax.routing.plan import Plan, TokenChoice

losses = Registry("loss")


@struct.dataclass
class Routing:
    """What a layer decided, for losses and statistics.

    Attributes:
      logits: the router's output, float32.
      probs: each token's distribution over experts, rows summing to 1.
      plan: the plan that was executed.
      valid: False for padding.
    """

    logits: Float[Array, "g n o"]
    probs: Float[Array, "g n e"]
    plan: Plan
    valid: Bool[Array, "g n"]


@runtime_checkable
class Loss(Protocol):
    """A frozen dataclass with a `coef`; calling it gives the weighted scalar."""

    coef: float

    def __call__(self, routing: Routing) -> Float[Array, ""]: ...


@losses.register("balance")
@dataclasses.dataclass(frozen=True)
class Balance:
    """`coef * e * sum_i f_i P_i`: f is the share of choices that want expert i, P its mean probability (Fedus et al. 2021, eq. 4).

    f counts what tokens want before capacity, sums to 1, and passes no gradient.

    Attributes:
      coef: weight; may be negative.
      count: 'all' choices (OLMoE, Mixtral up to their factor k), or only the 'first' (GShard, ST-MoE).
      over: 'group' averages f and P inside each group and then over groups, which is the same however a batch is cut into
        microbatches as long as groups stay whole; 'batch' averages over all tokens first.
      share: f as a share of all 'choices', or of all 'tokens', for rules under which the number of choices varies: a token with
        three experts then counts three times, and uniform routing costs `coef` times the mean number of experts (Huang et al. 2024).
    """

    coef: float = 0.01
    count: Literal["all", "first"] = "all"
    over: Literal["group", "batch"] = "group"
    share: Literal["choices", "tokens"] = "choices"

    def __post_init__(self) -> None:
        check_choice("count", self.count, ("all", "first"))
        check_choice("share", self.share, ("choices", "tokens"))
        check_choice("over", self.over, ("group", "batch"))

    def __call__(self, routing: Routing) -> Float[Array, ""]:
        wanted = _first(routing.plan) if self.count == "first" else routing.plan.wanted()
        wanted = jax.lax.stop_gradient(wanted) * routing.valid[..., None]
        axes = (0, 1) if self.over == "batch" else (1,)
        if self.share == "tokens":
            share = masked_mean(wanted, routing.valid, axes)
        else:
            share = wanted.sum(axes) / jnp.maximum(wanted.sum(axes).sum(-1, keepdims=True), 1e-9)
        mean_prob = masked_mean(routing.probs, routing.valid, axes)
        per_group = self._cost(share, mean_prob)
        if self.over == "batch":
            return self.coef * per_group
        # Groups count by their number of valid tokens, so that an empty group counts nothing.
        tokens = routing.valid.sum(1)
        return self.coef * (per_group * tokens).sum() / jnp.maximum(tokens.sum(), 1)

    def _cost(self, share: Float[Array, "*g e"], mean_prob: Float[Array, "*g e"]) -> Float[Array, "*g"]:
        return share.shape[-1] * (share * mean_prob).sum(-1)


@losses.register("device_balance")
@dataclasses.dataclass(frozen=True)
class DeviceBalance(Balance):
    """`coef * D * sum_d F_d P_d` over D devices of `e / D` neighbouring experts each, F_d and P_d being the sums of f and P over a
    device's experts (DeepSeekMoE, Dai et al. 2024, eq. 15-17): devices are to be loaded alike, experts of one device need not.

    Fields as in `Balance`, and on the same scale: 1 under uniform routing, D when one device takes everything.

    Attributes:
      devices: D.
    """

    coef: float = 0.05
    devices: int = 1

    def _cost(self, share: Float[Array, "*g e"], mean_prob: Float[Array, "*g e"]) -> Float[Array, "*g"]:
        if share.shape[-1] % self.devices:
            raise ConfigError(f"losses.device_balance.devices={self.devices} must divide num_experts={share.shape[-1]}")
        share, mean_prob = (x.reshape(*x.shape[:-1], self.devices, -1).sum(-1) for x in (share, mean_prob))
        return super()._cost(share, mean_prob)


@losses.register("importance")
@dataclasses.dataclass(frozen=True)
class Importance:
    """`coef * CV(importance)^2`, importance being each expert's summed gate over the batch (Shazeer et al. 2017, eq. 6-7).

    Attributes:
      coef: weight.
      gates: 'weights' sums the plan's weights of used choices, as the paper does; 'probs' sums all probabilities.
    """

    coef: float = 0.1
    gates: Literal["weights", "probs"] = "weights"

    def __post_init__(self) -> None:
        check_choice("gates", self.gates, ("weights", "probs"))

    def __call__(self, routing: Routing) -> Float[Array, ""]:
        gates = routing.probs if self.gates == "probs" or not hasattr(routing.plan, "dense") else routing.plan.dense()
        importance = (gates * routing.valid[..., None]).sum((0, 1))
        return self.coef * importance.var() / (jnp.square(importance.mean()) + 1e-10)


@losses.register("z")
@dataclasses.dataclass(frozen=True)
class ZLoss:
    """`coef * mean_t logsumexp(logits_t)^2` keeps router logits small (Zoph et al. 2022, eq. 5)."""

    coef: float = 1e-3

    def __call__(self, routing: Routing) -> Float[Array, ""]:
        return self.coef * masked_mean(jnp.square(jax.nn.logsumexp(routing.logits, axis=-1)), routing.valid, (0, 1))


@losses.register("entropy")
@dataclasses.dataclass(frozen=True)
class Entropy:
    """`coef * mean_t H(probs_t)`, in nats, minimised: a token's router is to make up its mind (Huang et al. 2024)."""

    coef: float = 1e-4

    def __call__(self, routing: Routing) -> Float[Array, ""]:
        # The logarithm's derivative at 0 is infinite, and 0 * log 0 is 0.
        safe = jnp.where(routing.probs > 0, routing.probs, 1)
        return self.coef * masked_mean(-(routing.probs * jnp.log(safe)).sum(-1), routing.valid, (0, 1))


@losses.register("spread")
@dataclasses.dataclass(frozen=True)
class Spread:
    """`coef * sum_e p_e log p_e` with p the mean of softmax(logits) over tokens: the entropy of average use, maximised (Csordas et al.
    2023). Minus `coef * log e` at best, and no number of choices in it. The softmax is of the raw logits whatever rule selects.

    Attributes:
      coef: gamma, above 0 to spread the load.
      over: p is of the 'batch' (sigma-MoE), or of each 'group', whose losses are averaged (MoEUT's choice).
    """

    coef: float = 1e-3
    over: Literal["batch", "group"] = "batch"

    def __post_init__(self) -> None:
        check_choice("over", self.over, ("batch", "group"))

    def __call__(self, routing: Routing) -> Float[Array, ""]:
        p = masked_mean(jax.nn.softmax(routing.logits, axis=-1), routing.valid, (0, 1) if self.over == "batch" else (1,))
        negative = (p * jnp.log(jnp.where(p > 0, p, 1))).sum(-1)
        if self.over == "batch":
            return self.coef * negative
        tokens = routing.valid.sum(1)
        return self.coef * (negative * tokens).sum() / jnp.maximum(tokens.sum(), 1)


def masked_mean(values: Float[Array, "g n *e"], valid: Bool[Array, "g n"], axes: tuple[int, ...]) -> Array:
    """Mean over the valid tokens along `axes` (group and token axes only); 0 where there are none."""
    mask = valid.reshape(*valid.shape, *(1,) * (values.ndim - 2)).astype(values.dtype)
    return (values * mask).sum(axes) / jnp.maximum(mask.sum(axes), 1)


def _first(plan: Plan) -> Float[Array, "g n e"]:
    if not isinstance(plan, TokenChoice):
        raise ConfigError(f"losses.balance.count='first' needs token choice, not {type(plan).__name__}; use count='all'")
    one_hot = jax.nn.one_hot(plan.expert[..., 0], plan.num_experts, dtype=jnp.float32)
    return one_hot * (plan.used | plan.dropped)[..., :1]
