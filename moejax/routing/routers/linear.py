"""The linear router, that of nearly every paper."""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.core.context import Context
from moejax.core.fields import NonNegative
from moejax.core.initializers.registry import initializers
from moejax.core.initializers.usual import FanIn
from moejax.core.layer import RowWise
from moejax.core.params import Initializer, param
from moejax.routing.routers.base import Router, float32_dot, routers


@routers.register("linear", slots={"init_w": initializers})
class Linear(Router, RowWise):
    """`logits = x W`, the router of nearly every paper.

    Attributes:
      num_experts: e.
      jitter: in training the router's input is multiplied by U(1 - jitter, 1 + jitter) (Switch, 1e-2).
      noise_std: in training, Gaussian noise of this standard deviation is added to the logits (V-MoE: 1 / num_experts).
      use_bias: adds a learned bias to the logits.
      init_w: how W starts: by fan-in with scale 0.1 as in Switch (Fedus et al. 2021, table 3). BASE layers start with expert
        embeddings orthogonal to each other, of length 0.1.
      null_start: null experts' columns are 'drawn' like the others, or 'copied' from the experts in turn, so that a trained router
        keeps its order when null experts join it (AdaMoE in Mixtral; ties go to the experts).
      precision: of inputs, weights and logits; 'bfloat16' is for measuring what it costs (ST-MoE, Zoph et al. 2022).
    """

    jitter: NonNegative = 0.0
    noise_std: NonNegative = 0.0
    use_bias: bool = False
    init_w: Initializer = FanIn(0.1)
    null_start: Literal["drawn", "copied"] = "drawn"
    precision: Literal["float32", "bfloat16"] = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "g n d"], ctx: Context) -> Float[Array, "g n o"]:
        o = self.num_outputs
        init = _repeated(self.init_w, o - self.outputs[1]) if self.null_start == "copied" else self.init_w
        w = param(self, "w", init, (x.shape[-1], o), ("embed", None))
        x = x.astype(jnp.float32)
        if ctx.train and self.jitter:
            x = x * jax.random.uniform(self.make_rng("router"), x.shape, minval=1 - self.jitter, maxval=1 + self.jitter)
        logits = float32_dot(x, w) if self.precision == "float32" else _rough_dot(x, w)
        if self.use_bias:
            logits = logits + param(self, "b", nn.initializers.zeros, (o,), (None,))
        if ctx.train and self.noise_std:
            logits = logits + self.noise_std * jax.random.normal(self.make_rng("router"), logits.shape)
        return logits


def _repeated(init: Any, columns: int) -> Any:
    """The initialiser for the first `columns`, and copies of them for those that follow."""

    def start(key: Array, shape: tuple[int, int], *rest: Any) -> Float[Array, "d o"]:
        return init(key, (shape[0], columns), *rest)[:, jnp.arange(shape[1]) % columns]

    return start


def _rough_dot(x: Float[Array, "g n d"], w: Float[Array, "d o"]) -> Float[Array, "g n o"]:
    return (x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(jnp.float32)
