"""Routers that remember what was routed in the layers below (RMoE, Qiu et al. 2024), and a witness of how much they do.

The recurrence runs over depth, never over tokens, so it is causal and needs no cache: see `moejax.core.carried`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.core.carried import Declared, shared
from moejax.core.context import Context
from moejax.core.fields import Count, NonNegative
from moejax.core.layer import RowWise
from moejax.core.params import param
from moejax.core.sowing import sow
from moejax.routing.routers.base import AnyRouter, Router, float32_dot, routers, told

Weights = Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class Cell:
    """A recurrent cell `step(x', state, weights) -> state`; its state is `states` vectors of width p, the output first."""

    gates: int
    states: int
    step: Callable[[Array, Array, Weights], Array]


def _gru(x: Float[Array, "g n p"], h: Float[Array, "g n p"], w: Weights) -> Float[Array, "g n p"]:
    xr, xz, xn = jnp.split(float32_dot(x, w["w_in"]) + w["b_in"], 3, axis=-1)
    hr, hz, hn = jnp.split(float32_dot(h, w["w_state"]) + w["b_state"], 3, axis=-1)
    r, z = jax.nn.sigmoid(xr + hr), jax.nn.sigmoid(xz + hz)
    return (1 - z) * jnp.tanh(xn + r * hn) + z * h


def _rnn(x: Float[Array, "g n p"], h: Float[Array, "g n p"], w: Weights) -> Float[Array, "g n p"]:
    return jnp.tanh(float32_dot(x, w["w_in"]) + w["b_in"] + float32_dot(h, w["w_state"]) + w["b_state"])


def _lstm(x: Float[Array, "g n p"], state: Float[Array, "g n p2"], w: Weights) -> Float[Array, "g n p2"]:
    h, c = jnp.split(state, 2, axis=-1)
    i, f, n, o = jnp.split(float32_dot(x, w["w_in"]) + w["b_in"] + float32_dot(h, w["w_state"]) + w["b_state"], 4, axis=-1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(n)
    return jnp.concatenate([jax.nn.sigmoid(o) * jnp.tanh(c), c], axis=-1)


CELLS = {"gru": Cell(3, 1, _gru), "lstm": Cell(4, 2, _lstm), "rnn": Cell(1, 1, _rnn)}
PASSING = {"through": lambda h: h, "detached": jax.lax.stop_gradient, "none": jnp.zeros_like}


@routers.register("recurrent")
class Recurrent(Router, RowWise):
    """`h_i = GRU(P_i x_i, h_(i-1)); logits_i = G_i h_i`, for the i-th routed layer of the stack; h_0 = 0.

    P_i and G_i belong to the layer, the cell's weights to all layers. Gradients flow back through the states of all layers
    below, which the paper finds to be the point. Layers without this router pass the state on as it is.

    Attributes:
      num_experts: e.
      width: p, of the state; the same in all layers.
      cell: 'gru', or the paper's ablations 'lstm' and 'rnn'. An 'rnn' without passing is a router of two layers.
      passing: the state comes 'through'; 'detached' from the gradient, or 'none' comes, both the paper's ablations.
      projector: P is the 'layer's, or 'shared' by all of them (the paper's ablation).
      init_scale: of G, truncated normal with variance init_scale / p. The state is bounded, so G alone sets the logits' size.
    """

    width: Count = 128
    cell: Literal["gru", "lstm", "rnn"] = "gru"
    passing: Literal["through", "detached", "none"] = "through"
    projector: Literal["layer", "shared"] = "layer"
    init_scale: NonNegative = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "g n d"], ctx: Context) -> Float[Array, "g n o"]:
        weights = shared(self, ctx, "recurrent_router", self.shares(x.shape[-1]))
        projector = weights.get("projector")
        if projector is None:
            projector = param(self, "projector", *self._projector(x.shape[-1]))
        before = ctx.recall("recurrent_router", self.carries(*x.shape[:2])["recurrent_router"])
        state = CELLS[self.cell].step(float32_dot(x.astype(jnp.float32), projector), PASSING[self.passing](before), weights)
        ctx.remember("recurrent_router", state)
        init = nn.initializers.variance_scaling(self.init_scale, "fan_in", "truncated_normal")
        out = param(self, "w", init, (self.width, self.num_outputs), (None, None))
        return float32_dot(state[..., : self.width], out)

    def carries(self, b: int, s: int) -> dict[str, Array]:
        """The state of every token before the first layer."""
        return {"recurrent_router": jnp.zeros((b, s, CELLS[self.cell].states * self.width), jnp.float32)}

    def shares(self, width: int) -> dict[str, dict[str, Declared]]:
        """The cell's weights, for tokens of this width; U(-1/sqrt(p), 1/sqrt(p)) as in PyTorch."""
        p, gates = self.width, CELLS[self.cell].gates
        bound = p**-0.5

        def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        declared = {
            "w_in": (init, (p, gates * p), (None, None)),
            "w_state": (init, (p, gates * p), (None, None)),
            "b_in": (init, (gates * p,), (None,)),
            "b_state": (init, (gates * p,), (None,)),
        }
        if self.projector == "shared":
            declared["projector"] = self._projector(width)
        return {"recurrent_router": declared}

    def _projector(self, width: int) -> Declared:
        return nn.initializers.lecun_normal(), (width, self.width), ("embed", None)


@routers.register("residual_logits", slots={"router": routers})
class ResidualLogits(Router, RowWise):
    """The logits of `router` plus those of the routed layer below: memory without a cell of its own (RMoE's ablation).

    Attributes:
      router: any router.
      detached: no gradient flows into the layers below.
    """

    router: AnyRouter
    detached: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "router", told(self.router, self.outputs))
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Float[Array, "g n d"], ctx: Context) -> Float[Array, "g n o"]:
        before = ctx.recall("residual_logits", self.carries(*x.shape[:2])["residual_logits"])
        logits = self.router(x, ctx).astype(jnp.float32) + PASSING["detached" if self.detached else "through"](before)
        ctx.remember("residual_logits", logits)
        return logits

    def carries(self, b: int, s: int) -> dict[str, Array]:
        """No preference before the first layer."""
        return {"residual_logits": jnp.zeros((b, s, self.num_outputs), jnp.float32)}


@routers.register("witnessed", slots={"router": routers})
class Witnessed(Router, RowWise):
    """The logits of `router`, unchanged; reports how much its choices tell about those of the routed layer below.

    Sows into 'stats', over the batch's valid tokens: `mutual_information` of the two layers' first choices, in nats, and
    `same_choice`, the share of tokens that go to the expert of the same number. The first layer has nothing below: 0.

    Attributes:
      router: any router; where it gives more than one logit for each expert, its first choice is the largest of all.
    """

    router: AnyRouter

    def __post_init__(self) -> None:
        object.__setattr__(self, "router", told(self.router, self.outputs))
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Float[Array, "g n d"], ctx: Context) -> Float[Array, "g n o"]:
        logits = self.router(x, ctx)
        choice = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1])
        before = ctx.recall("witnessed_choice", self.carries(*x.shape[:2])["witnessed_choice"])
        ctx.remember("witnessed_choice", choice)
        counted = ctx.real(x).astype(jnp.float32)
        joint = jnp.einsum("gni,gnj,gn->ij", before, choice, counted) / jnp.maximum(counted.sum(), 1)
        for name, value in (("mutual_information", _mutual_information(joint)), ("same_choice", jnp.trace(joint))):
            sow(self, "stats", name, value)
        return logits

    def carries(self, b: int, s: int) -> dict[str, Array]:
        """No choice before the first layer: not even an expert of number 0."""
        return {"witnessed_choice": jnp.zeros((b, s, self.num_outputs), jnp.float32)}


def _mutual_information(joint: Float[Array, "i j"]) -> Float[Array, ""]:
    """`sum_ij p_ij log(p_ij / (p_i p_j))`, where 0 log 0 = 0."""
    apart = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    return jnp.where(seen, joint * jnp.log(jnp.where(seen, joint, 1) / jnp.where(seen, apart, 1)), 0).sum()
