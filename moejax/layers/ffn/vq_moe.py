"""VQMoE (Do et al. 2024): beside the routed path, a path whose expert is named by a learned code, over the same experts."""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moejax.core.context import Context
from moejax.core.errors import ConfigError, check_choice
from moejax.core.params import param
from moejax.core.sowing import sow
from moejax.layers.ffn.moe import SLOTS, MoE
from moejax.layers.registry import ffns
from moejax.layers.routed import run_plan, sow_routing
from moejax.routing.losses.base import Routing, masked_mean
from moejax.routing.plan import dropless

OPTIONS = {
    "quantise": ("straight_through", "blend"),
    "distance": ("euclidean", "cosine"),
    "paths": ("both", "discrete"),
    "combine": ("gate", "mean"),
    "codebook": ("learned", "averaged"),
}
MEMORY = 0.99  # of running means: codes' use and, where they are averages, their tokens


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
      combine: 'gate' learns a; 'mean' takes halves.
      revive_below: in training, a code whose running use falls below this share of 1 / K is moved to a random token of the batch;
        0 never. Microbatches move it to the mean of one token of each.

    Collections: sows the loss as 'vq_loss' and the stat code_perplexity; keeps running use, and the moves of revived codes or the
    averages of averaged ones, in 'router_state'.
    """

    num_codes: int | None = None
    quantise: Literal["straight_through", "blend"] = "straight_through"
    rho: float = 0.05
    coef: float = 0.08
    commitment: float = 0.25
    distance: Literal["euclidean", "cosine"] = "euclidean"
    paths: Literal["both", "discrete"] = "both"
    combine: Literal["gate", "mean"] = "gate"
    revive_below: float = 0.0
    codebook: Literal["learned", "averaged"] = "learned"

    def __post_init__(self) -> None:
        for name, options in OPTIONS.items():
            check_choice(name, getattr(self, name), options)
        if not 0 <= self.revive_below < 1:
            raise ConfigError(f"revive_below={self.revive_below} must be at least 0 and below 1: a share of the mean use")
        if self.revive_below and self.codebook == "averaged":
            raise ConfigError(f"revive_below={self.revive_below} moves learned codes; take codebook='learned', or 0")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"], ctx: Context | None = None) -> Float[Array, "b s d"]:
        """See the class; padding gets zeros."""
        ctx = ctx or Context()
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
        e, valid = self.bank.num_experts, jnp.ones(x.shape[:2], bool) if ctx.valid is None else ctx.valid
        quantised, scores, code = self._quantise(x.astype(jnp.float32), valid, ctx.train)
        used = valid[..., None]
        expert = (code % e)[..., None]
        plan = dropless(expert, jnp.ones(expert.shape), used, e)
        rows = nn.LayerNorm(name="code_norm")(quantised).astype(x.dtype)
        y, plan, backend = run_plan(plan, lambda rows, layout: self.bank(rows, layout, ctx), rows, self.backend)
        if self.paths == "discrete":
            own = jax.nn.one_hot(jnp.arange(scores.shape[-1]) % e, e)
            probs = jax.nn.softmax(scores, axis=-1) @ own
            sow_routing(self, Routing(scores, probs, plan, valid), (), backend=backend)
        return jnp.where(used, nn.LayerNorm(dtype=x.dtype, name="output_norm")(y), 0)

    def _quantise(
        self, x: Float[Array, "b s d"], valid: Bool[Array, "b s"], train: bool
    ) -> tuple[Float[Array, "b s d"], Float[Array, "b s k"], Array]:
        """The quantised tokens, how near each code is (0 at best, or 1 for cosines), and the nearest code."""
        codes, state = self._codes(x.shape[-1])
        k = codes.shape[0]
        scores = _nearness(jax.lax.stop_gradient(x), jax.lax.stop_gradient(codes), self.distance)
        code = jnp.argmax(scores, axis=-1)
        one_hot = jax.nn.one_hot(code, k)
        nearest = jnp.einsum("bsk,kd->bsd", one_hot, codes, precision=jax.lax.Precision.HIGHEST)
        stop = jax.lax.stop_gradient
        error = self.commitment * jnp.square(x - stop(nearest))
        if self.codebook == "learned":
            error = error + jnp.square(nearest - stop(x))
        sow(self, "losses", "vq_loss", self.coef * masked_mean(error, valid, (0, 1)).mean())
        use = masked_mean(one_hot, valid, (0, 1))
        sow(self, "stats", "code_perplexity", jnp.exp(-jax.scipy.special.xlogy(use, use).sum()))
        if state is not None and train and self.is_mutable_collection("router_state"):
            update = self._revived if self.revive_below else self._averaged
            state.value = stop(update(state.value, codes, x, valid, use, one_hot))
        if self.quantise == "blend":
            return (1 - self.rho) * x + self.rho * stop(nearest - x), scores, code
        return x + stop(nearest - x), scores, code

    def _codes(self, width: int) -> tuple[Float[Array, "k d"], nn.Variable | None]:
        """The codebook, and the state that it rests on if there is one."""
        k = self.num_codes or self.bank.num_experts
        if self.codebook == "averaged":
            start = _uniform(1 / k)
            state = self.variable(
                "router_state",
                "codes",
                lambda: {"total": start(self.make_rng("params"), (k, width)) / k, "use": jnp.full(k, 1 / k)},
            )
            return state.value["total"] / jnp.maximum(state.value["use"], 1e-9)[:, None], state
        codes = param(self, "codebook", _uniform(1 / k), (k, width), (None, "embed"))
        if not self.revive_below:
            return codes, None
        # A parameter cannot be set in a forward pass: where a code was moved to is kept beside it.
        state = self.variable("router_state", "codes", lambda: {"move": jnp.zeros(codes.shape), "use": jnp.full(k, 1 / k)})
        return codes + state.value["move"], state

    def _averaged(
        self,
        state: dict[str, Array],
        codes: Float[Array, "k d"],
        x: Float[Array, "b s d"],
        valid: Bool[Array, "b s"],
        use: Float[Array, "k"],
        one_hot: Float[Array, "b s k"],
    ) -> dict[str, Array]:
        """Running means over tokens of each code's use and of its tokens' sum. Linear, so microbatches' states can be averaged."""
        tokens = jnp.einsum("bsk,bsd->kd", one_hot * valid[..., None], x) / jnp.maximum(valid.sum(), 1)
        new = {"total": tokens, "use": use}
        return {name: MEMORY * state[name] + (1 - MEMORY) * new[name] for name in new}

    def _revived(
        self,
        state: dict[str, Array],
        codes: Float[Array, "k d"],
        x: Float[Array, "b s d"],
        valid: Bool[Array, "b s"],
        use: Float[Array, "k"],
        one_hot: Float[Array, "b s k"],
    ) -> dict[str, Array]:
        k, valid = codes.shape[0], valid.reshape(-1)
        dead = state["use"] < self.revive_below / k
        # All valid tokens alike, by the largest of random numbers.
        draw = jax.random.uniform(self.make_rng("router"), (k, valid.shape[0])) * valid
        token = x.reshape(-1, x.shape[-1])[jnp.argmax(draw, axis=-1)]
        move = jnp.where(dead[:, None], state["move"] + token - codes, state["move"])
        return {"move": move, "use": jnp.where(dead, 1 / k, MEMORY * state["use"] + (1 - MEMORY) * use)}

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
