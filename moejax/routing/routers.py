"""Routers: tokens -> logits, always in float32.

Router precision changes who is chosen: with 64 experts, bfloat16 logits change the chosen set of 2 % of the tokens. So inputs,
weights and products are float32 at the highest matmul precision whatever the model computes in.
"""

from typing import Any, Literal, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.context import Context
from moejax.errors import ConfigError, check_choice
from moejax.params import param
from moejax.registry import Registry

routers = Registry("router")


@runtime_checkable
class Router(Protocol):
    """`router(x[g, n, d], ctx) -> logits[g, n, o]` with o = num_experts * outputs_per_expert; ctx is regrouped like x.

    A router with a field `null_outputs` gives that many logits more, after those of the experts.
    """

    num_experts: int
    outputs_per_expert: int

    def __call__(self, x: Float[Array, "g n d"], ctx: Context) -> Float[Array, "g n o"]: ...


@routers.register("linear")
class Linear(nn.Module):
    """`logits = x W`, the router of nearly every paper.

    Attributes:
      num_experts: e.
      outputs_per_expert: logits per expert, more than one only for soft slots.
      null_outputs: logits of null experts, after those of the experts; a `MoE` sets it to what its select rule asks for.
      init_scale: scale of the truncated-normal, fan-in initialisation; 0.1 as in Switch (Fedus et al. 2021, table 3).
      jitter: in training the router's input is multiplied by U(1 - jitter, 1 + jitter) (Switch, 1e-2).
      noise_std: in training, Gaussian noise of this standard deviation is added to the logits (V-MoE: 1 / num_experts).
      use_bias: adds a learned bias to the logits.
      start: 'fan_in', or 'orthogonal': expert embeddings orthogonal to each other, of length `init_scale` (BASE layers: 0.1).
      null_start: null experts' columns are 'drawn' like the others, or 'copied' from the experts in turn, so that a trained router
        keeps its order when null experts join it (AdaMoE in Mixtral; ties go to the experts).
      precision: of inputs, weights and logits; 'bfloat16' is for measuring what it costs (ST-MoE, Zoph et al. 2022).
    """

    num_experts: int
    outputs_per_expert: int = 1
    null_outputs: int = 0
    init_scale: float = 0.1
    jitter: float = 0.0
    noise_std: float = 0.0
    use_bias: bool = False
    start: Literal["fan_in", "orthogonal"] = "fan_in"
    null_start: Literal["drawn", "copied"] = "drawn"
    precision: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        check_choice("start", self.start, ("fan_in", "orthogonal"))
        check_choice("null_start", self.null_start, ("drawn", "copied"))
        check_choice("precision", self.precision, ("float32", "bfloat16"))
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Float[Array, "g n d"], ctx: Context) -> Float[Array, "g n o"]:
        o = self.num_experts * self.outputs_per_expert + self.null_outputs
        init = nn.initializers.variance_scaling(self.init_scale, "fan_in", "truncated_normal")
        if self.start == "orthogonal":
            init = nn.initializers.orthogonal(self.init_scale)
        if self.null_start == "copied":
            init = _repeated(init, o - self.null_outputs)
        w = param(self, "w", init, (x.shape[-1], o), ("embed", None))
        x = x.astype(jnp.float32)
        if ctx.train and self.jitter:
            x = x * jax.random.uniform(self.make_rng("router"), x.shape, minval=1 - self.jitter, maxval=1 + self.jitter)
        logits = _dot(x, w) if self.precision == "float32" else _rough_dot(x, w)
        if self.use_bias:
            logits = logits + param(self, "b", nn.initializers.zeros, (o,), (None,))
        if ctx.train and self.noise_std:
            logits = logits + self.noise_std * jax.random.normal(self.make_rng("router"), logits.shape)
        return logits


@routers.register("cosine")
class Cosine(nn.Module):
    """`logits = scale * <x / |x|, w_o / |w_o|>` with a learned scale: X-MoE's cosine router and the router of Soft MoE.

    Attributes:
      num_experts: e.
      outputs_per_expert: logits per expert (slots of Soft MoE).
      null_outputs: see `Linear`.
      projection: width of a linear projection of x before the comparison (X-MoE); None compares x itself (Soft MoE).
      scale_init: initial scale; 1 in Soft MoE, 1 / temperature elsewhere.
      normalise: False drops both norms (Soft MoE's ablation), leaving `scale * <x, w_o>`.
    """

    num_experts: int
    outputs_per_expert: int = 1
    null_outputs: int = 0
    projection: int | None = None
    scale_init: float = 1.0
    normalise: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "g n d"], ctx: Context) -> Float[Array, "g n o"]:
        o = self.num_experts * self.outputs_per_expert + self.null_outputs
        x = x.astype(jnp.float32)
        if self.projection is not None:
            into = param(self, "projection", nn.initializers.lecun_normal(), (x.shape[-1], self.projection), ("embed", None))
            x = _dot(x, into)
        w = param(self, "w", nn.initializers.lecun_normal(), (x.shape[-1], o), ("embed", None))
        scale = param(self, "scale", nn.initializers.constant(self.scale_init), (), ())
        if self.normalise:
            x = x * jax.lax.rsqrt(jnp.sum(jnp.square(x), -1, keepdims=True) + 1e-6)
            w = w * jax.lax.rsqrt(jnp.sum(jnp.square(w), 0, keepdims=True) + 1e-6)
        return _dot(x, w * scale)


@routers.register("random")
class Random(nn.Module):
    """Gaussian logits that do not look at the token: the control of what learning to route is worth.

    Outside training the draw is fixed by `eval_seed`, so that evaluation is repeatable.
    """

    num_experts: int
    outputs_per_expert: int = 1
    null_outputs: int = 0
    std: float = 1.0
    eval_seed: int = 0

    @nn.compact
    def __call__(self, x: Float[Array, "g n d"], ctx: Context) -> Float[Array, "g n o"]:
        key = self.make_rng("router") if ctx.train else jax.random.key(self.eval_seed)
        o = self.num_experts * self.outputs_per_expert + self.null_outputs
        return self.std * jax.random.normal(key, (*x.shape[:2], o))


def check_num_experts(router: Any, bank: Any) -> None:
    """A router and a bank must agree on the number of experts."""
    ours, theirs = getattr(router, "num_experts", None), getattr(bank, "num_experts", None)
    if ours is not None and theirs is not None and ours != theirs:
        raise ConfigError(f"router.num_experts={ours} but bank.num_experts={theirs}; give both the same number")


def with_null_outputs(router: Any, num_null: int) -> Any:
    """The router with a logit for each null expert of a select rule; as it is where it has no such field, or enough."""
    if not num_null or getattr(router, "null_outputs", None) != 0:
        return router
    return router.clone(null_outputs=num_null)


def _repeated(init: Any, columns: int) -> Any:
    """The initialiser for the first `columns`, and copies of them for those that follow."""

    def start(key: Array, shape: tuple[int, int], *rest: Any) -> Float[Array, "d o"]:
        return init(key, (shape[0], columns), *rest)[:, jnp.arange(shape[1]) % columns]

    return start


def _dot(x: Float[Array, "g n d"], w: Float[Array, "d o"]) -> Float[Array, "g n o"]:
    return jnp.einsum("gnd,do->gno", x, w.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


def _rough_dot(x: Float[Array, "g n d"], w: Float[Array, "d o"]) -> Float[Array, "g n o"]:
    return (x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(jnp.float32)
