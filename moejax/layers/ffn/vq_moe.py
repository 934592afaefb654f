"""VQMoE (Do et al. 2024): beside the routed path, a path whose expert is named by a learned code, over the same experts."""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moejax.core.context import Context
from moejax.core.control import Site, control
from moejax.core.errors import ConfigError
from moejax.core.fields import Count, Fraction, NonNegative, Positive, Rate
from moejax.core.params import param
from moejax.core.sowing import sow, sow_loss
from moejax.experts.base import experts_of
from moejax.layers.ffn.moe import SLOTS, MoE
from moejax.layers.registry import ffns
from moejax.layers.routed import run_plan, sow_routing
from moejax.routing.losses.base import Routing, masked_mean
from moejax.routing.plan import dropless

MEMORY = 0.99  # of running means: codes' use and, where they are averages, their tokens


@dataclasses.dataclass(frozen=True)
class AverageCodes:
    """Codes as running averages of their tokens (van den Oord et al. 2017, appendix A.1): of each code's use and of its tokens' sum."""

    def after_step(self, site: Site) -> Site:
        tokens = jnp.maximum(site.measured["tokens"], 1)
        follow = {name: MEMORY * site.state[name] + (1 - MEMORY) * site.measured[name] / tokens for name in ("total", "use")}
        return site.replace(state={**site.state, **follow})


@dataclasses.dataclass(frozen=True)
class ReviveCodes:
    """Moves a code whose running use is below `below` / K to a token of the step, with fresh optimizer memory."""

    below: float

    def after_step(self, site: Site) -> Site:
        use, measured = site.state["use"], site.measured
        dead = use < self.below / use.shape[0]
        followed = MEMORY * use + (1 - MEMORY) * measured["use"] / jnp.maximum(measured["tokens"], 1)
        codes = jnp.where(dead[:, None], measured["drawn"] / measured["calls"], site.params["codebook"])
        return site.replace(
            params={**site.params, "codebook": codes.astype(site.params["codebook"].dtype)},
            state={**site.state, "use": jnp.where(dead, 1 / use.shape[0], followed)},
            restarted={"codebook": dead[:, None]},
        )


@ffns.register("vq_moe", slots=SLOTS)
class VQMoE(MoE):
    """`y = a_1 MoE(x) + a_2 LN(E_{c mod e}(LN(x_q)))` with c the code nearest to x, x_q the token quantised to it, and
    `a = softmax(x W)`. Both paths run the same experts, so a token runs one more than the rule selects.

    Fields as in `MoE`, and

    Attributes:
      num_codes: K; as many as experts if None. What is no multiple of e loads them unevenly.
      quantise: x_q is the code, with the gradient of x ('straight_through'), or `(1 - rho) x + rho sg(code - x)`, which for a small
        rho is nearly x itself ('blend', the released code's default).
      rho: of 'blend'.
      codebook: its codes are parameters, 'learned' from the loss below, or each is the running average of its own tokens
        ('averaged', van den Oord et al. 2017, appendix A.1), kept in 'router_state'; the loss then pulls on tokens alone.
      coef: weight of the loss `mean (code - sg(x))^2 + commitment * mean (x - sg(code))^2`; learned codes learn from nothing else.
      commitment: see above.
      distance: which code is nearest: 'euclidean' or 'cosine'.
      paths: 'both', or 'discrete' alone, which needs no router (the paper's fine-tuning).
      epsilon: of the norms LN, added to the variance.
      combine: 'gate' learns a; 'mean' takes halves.
      revive_below: in training, a code whose running use falls below this share of 1 / K is moved to a random token of the batch;
        0 never. Of several microbatches, it is moved to the mean of one token of each.

    Collections: sows the loss as 'vq_loss' and the stat code_perplexity; keeps running use, and the sums of averaged codes, in
    'router_state', which controllers move after every optimizer step.
    """

    num_codes: Count | None = None
    quantise: Literal["straight_through", "blend"] = "straight_through"
    rho: Fraction = 0.05
    coef: float = 0.08
    commitment: NonNegative = 0.25
    distance: Literal["euclidean", "cosine"] = "euclidean"
    paths: Literal["both", "discrete"] = "both"
    combine: Literal["gate", "mean"] = "gate"
    revive_below: Rate = 0.0
    epsilon: Positive = 1e-6
    codebook: Literal["learned", "averaged"] = "learned"

    def __post_init__(self) -> None:
        if self.revive_below and self.codebook == "averaged":
            raise ConfigError(f"revive_below={self.revive_below} moves learned codes; take codebook='learned', or 0")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"], ctx: Context | None = None) -> Float[Array, "b s d"]:
        """See the class; padding gets zeros."""
        ctx = ctx or Context()
        ctx.fit(x)
        x = ctx.clean(x)
        discrete = self._discrete(x, ctx)
        if self.paths == "discrete":
            return discrete
        routed = super().__call__(x, ctx)
        if self.combine == "mean":
            return (routed + discrete) / 2
        w = param(self, "gate", nn.initializers.lecun_normal(), (x.shape[-1], 2), ("embed", None), role="routers")
        a = jax.nn.softmax(jnp.einsum("bsd,do->bso", x.astype(jnp.float32), w), axis=-1).astype(x.dtype)
        return a[..., :1] * routed + a[..., 1:] * discrete

    def _discrete(self, x: Float[Array, "b s d"], ctx: Context) -> Float[Array, "b s d"]:
        e, valid = self.bank.num_experts, ctx.real(x)
        quantised, scores, code = self._quantise(x.astype(jnp.float32), valid, ctx.train)
        used = valid[..., None]
        expert = (code % e)[..., None]
        plan = dropless(expert, jnp.ones(expert.shape), used, e)
        rows = nn.LayerNorm(self.epsilon, name="code_norm")(quantised).astype(x.dtype)
        y, plan, backend = run_plan(plan, experts_of(self.bank, rows.shape[-1], ctx), rows, self.backend)
        if self.paths == "discrete":
            own = jax.nn.one_hot(jnp.arange(scores.shape[-1]) % e, e)
            probs = jax.nn.softmax(scores, axis=-1) @ own
            sow_routing(self, Routing(scores, probs, plan, valid), (), backend=backend)
        return jnp.where(used, nn.LayerNorm(self.epsilon, dtype=x.dtype, name="output_norm")(y), 0)

    def _quantise(
        self, x: Float[Array, "b s d"], valid: Bool[Array, "b s"], train: bool
    ) -> tuple[Float[Array, "b s d"], Float[Array, "b s k"], Array]:
        """The quantised tokens, how near each code is (0 at best, or 1 for cosines), and the nearest code."""
        codes = self._codes(x.shape[-1])
        k = codes.shape[0]
        scores = _nearness(jax.lax.stop_gradient(x), jax.lax.stop_gradient(codes), self.distance)
        code = jnp.argmax(scores, axis=-1)
        one_hot = jax.nn.one_hot(code, k)
        nearest = jnp.einsum("bsk,kd->bsd", one_hot, codes, precision=jax.lax.Precision.HIGHEST)
        stop = jax.lax.stop_gradient
        error = self.commitment * jnp.square(x - stop(nearest))
        if self.codebook == "learned":
            error = error + jnp.square(nearest - stop(x))
        cost = self.coef * masked_mean(error, valid, (0, 1)).mean()
        sow_loss(self, "vq_loss", lambda: cost, valid.sum())
        use = masked_mean(one_hot, valid, (0, 1))
        sow(self, "stats", "code_perplexity", jnp.exp(-jax.scipy.special.xlogy(use, use).sum()))
        if train and (self.codebook == "averaged" or self.revive_below):
            rule = AverageCodes() if self.codebook == "averaged" else ReviveCodes(self.revive_below)
            control(self, "codes", rule, self._measured(x, valid, one_hot))
        if self.quantise == "blend":
            return (1 - self.rho) * x + self.rho * stop(nearest - x), scores, code
        return x + stop(nearest - x), scores, code

    def _codes(self, width: int) -> Float[Array, "k d"]:
        """The codebook; declares the state that moves it, if any does."""
        k = self.num_codes or self.bank.num_experts
        if self.codebook == "averaged" or self.revive_below:
            use = self.variable("router_state", "use", lambda: jnp.full(k, 1 / k)).value
        if self.codebook == "averaged":
            start = _uniform(1 / k)
            total = self.variable("router_state", "total", lambda: start(self.make_rng("params"), (k, width)) / k).value
            return total / jnp.maximum(use, 1e-9)[:, None]
        return param(self, "codebook", _uniform(1 / k), (k, width), (None, "embed"))

    def _measured(
        self, x: Float[Array, "b s d"], valid: Bool[Array, "b s"], one_hot: Float[Array, "b s k"]
    ) -> dict[str, Array]:
        """Sums over the call's tokens that the codes are moved by."""
        found = {"use": (one_hot * valid[..., None]).sum((0, 1)), "tokens": valid.sum().astype(jnp.float32)}
        if self.codebook == "averaged":
            return {**found, "total": jnp.einsum("bsk,bsd->kd", one_hot * valid[..., None], x)}
        # All valid tokens alike, by the largest of random numbers.
        flat = valid.reshape(-1)
        draw = jax.random.uniform(self.make_rng("router"), (one_hot.shape[-1], flat.shape[0])) * flat
        return {**found, "drawn": x.reshape(-1, x.shape[-1])[jnp.argmax(draw, axis=-1)], "calls": jnp.ones(())}

    def active_fraction(self) -> float:
        """Share of the experts' parameters that a token uses: those that the rule selects, and the code's."""
        routed = 0 if self.paths == "discrete" else self.select.mean_experts(self.bank.num_experts)
        return min(1.0, (routed + 1) / self.bank.num_experts)

    def check_causal(self, where: str) -> None:
        """As `MoE`; codes look at their own token alone."""
        if self.paths == "both":
            super().check_causal(where)

    def decodable(self) -> str | None:
        """As `MoE`; codes look at their own token alone."""
        return super().decodable() if self.paths == "both" else None


def _nearness(x: Float[Array, "b s d"], codes: Float[Array, "k d"], distance: str) -> Float[Array, "b s k"]:
    """Minus squared distances, or cosines."""
    if distance == "cosine":
        x, codes = (a * jax.lax.rsqrt(jnp.square(a).sum(-1, keepdims=True) + 1e-12) for a in (x, codes))
    product = jnp.einsum("bsd,kd->bsk", x, codes, precision=jax.lax.Precision.HIGHEST)
    if distance == "cosine":
        return product
    return 2 * product - jnp.square(x).sum(-1, keepdims=True) - jnp.square(codes).sum(-1)


def _uniform(bound: float) -> nn.initializers.Initializer:
    def init(key: Array, shape: tuple[int, ...], dtype: type = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
