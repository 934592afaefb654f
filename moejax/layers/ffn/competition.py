"""CompeteSMoE (Pham et al. 2024, Nguyen et al. 2025): now and then all experts run, the strongest win, and the router learns who won."""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.core.fields import Count, Fraction, Whole
from moejax.core.layer import RowWise
from moejax.core.registry import Many
from moejax.core.sowing import batch_sum, sow, sow_loss
from moejax.dispatch import Backend, backend_index
from moejax.dispatch.layout import Batched
from moejax.experts.base import AnyBank, experts_of
from moejax.experts.registry import banks
from moejax.layers.registry import ffns
from moejax.layers.routed import run_plan, sow_losses, sow_routing
from moejax.parallel import constrain
from moejax.routing.losses.base import Loss, Routing, losses, masked_mean
from moejax.routing.plan import TokenPlan
from moejax.routing.routers.base import AnyRouter, ask, check_num_experts, routers, told
from moejax.routing.select import TopK

# How strongly an expert's output [..., o] answers a token.
AFFINITIES = {
    "softplus": lambda y: jax.nn.softplus(y).mean(-1),
    "relu": lambda y: jax.nn.relu(y).mean(-1),
    "silu": lambda y: jax.nn.silu(y).mean(-1),
    "sigmoid": lambda y: jax.nn.sigmoid(y).mean(-1),
    "norm": lambda y: jnp.sqrt(jnp.square(y).sum(-1) + 1e-12),
}


@struct.dataclass
class Outcome:
    """What a step gives, by the router or by competition: output, plan, backend, and the competition's losses; of the third, the means
    that it multiplies: how many tokens each expert wins, and how near they are to it."""

    y: Float[Array, "b s o"]
    plan: TokenPlan
    backend: Int[Array, ""]
    router: Float[Array, ""]
    diversity: Float[Array, ""]
    wins: Float[Array, "e"]
    nearness: Float[Array, "e"]


@ffns.register("competition", slots={"router": routers, "bank": banks, "losses": Many(losses)})
class Competition(RowWise):
    """A mixture whose training steps are of two kinds; inference uses the router alone.

    Router steps: softmax, top-k, weights divided by their sum, and `losses`, as in any mixture. Competition steps: all e experts g_i
    run on every token; the k with the largest affinity `a_i = mean_d softplus(g_i(x))_d` win, with weights `a_i / sum of winners' a`,
    through which the gradient flows. With A = softmax(a), P = softmax(router), winners S, the losses of such a step are

        router     MSE(P, A) + winners_coef * MSE(P[S], A[S])       A without gradient
        diversity  mean of the k x k cosine similarities of the winners' outputs, the diagonal set to 0
        balance    e * sum_e mean_t A_te mean_t 1[e is t's strongest]

    Each layer draws for itself, from a seed of its own and the step's number, whether it competes; the dense pass lies behind a
    `lax.cond`, so that other steps do not pay for it. The paper's first version is `affinity='norm', gate='softmax',
    target='winners', winners_coef=0, diversity_coef=0, router_coef=5`.

    Attributes:
      router: tokens -> logits.
      bank: the experts.
      k: experts per token.
      rate: share of steps in which a layer competes (the paper: 0.05 to 0.07).
      schedule: that share is 'constant', or 'decaying' as in the first version: `rate * 2 / (2 + sqrt(step + 1))`, steps from 0.
      warmup: steps at the start in which none does (the paper: the first twentieth of training).
      affinity: a name of `AFFINITIES`.
      gate: winners' weights: their affinities' 'share', or a 'softmax' over them (first version).
      target: what the router is to predict: the softmax over 'all' affinities, or the winners' softmax and 0 for the others.
      winners_coef: theta, extra weight of the winners in the router's loss.
      router_coef, diversity_coef, balance_coef: weights of the losses of competition steps.
      losses: routing losses of router steps.
      watch: outside training, also run all experts to report 'agreement' (share of the winners that the router chose) and
        'similarity' (mean cosine of two winners' outputs).
      backend: of dispatch in router steps.
      num_experts: only for configs, where it fills the router's and the bank's field of the same name.
    """

    router: AnyRouter
    bank: AnyBank
    k: Count = 2
    rate: Fraction = 0.07
    schedule: Literal["constant", "decaying"] = "constant"
    warmup: Whole = 0
    affinity: Literal[*AFFINITIES] = "softplus"
    gate: Literal["share", "softmax"] = "share"
    target: Literal["all", "winners"] = "all"
    winners_coef: float = 0.1
    router_coef: float = 0.01
    diversity_coef: float = 0.01
    balance_coef: float = 0.01
    losses: tuple[Loss, ...] = ()
    watch: bool = False
    backend: Backend = "auto"
    num_experts: Count | None = None

    def __post_init__(self) -> None:
        check_num_experts(self.router, self.bank)
        self._rule.check_num_experts(self.bank.num_experts)
        object.__setattr__(self, "router", told(self.router, self._rule.outputs))
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"], ctx: Context | None = None) -> Float[Array, "b s o"]:
        ctx = ctx or Context()
        ctx.fit(x)
        x, valid = ctx.clean(x), ctx.real(x)
        logits = ask(self.router, x, ctx)
        seed = self.variable("router_state", "seed", lambda: jax.random.bits(self.make_rng("params"))).value

        def route(layer: Competition, x: Array, logits: Array) -> Outcome:
            return layer._route(x, logits, valid, ctx)

        def compete(layer: Competition, x: Array, logits: Array) -> Outcome:
            return layer._compete(x, logits, valid, ctx)

        competing = jnp.zeros((), bool)
        if ctx.train and self.rate and not self.is_initializing():
            competing = self._drawn(seed, ctx)
            done = nn.cond(competing, compete, route, self, x, logits)
        else:
            done = route(self, x, logits)
        routing = Routing(logits, jax.nn.softmax(logits, axis=-1), done.plan, valid)
        competed = competing.astype(jnp.float32)
        sow_routing(self, routing, (), backend=done.backend, competing=competed)
        sow_losses(self, routing, self.losses, 1 - competed)
        tokens = valid.sum()

        def balance() -> Array:
            count = jnp.maximum(batch_sum(tokens), 1)
            wins, nearness = (batch_sum(mean * tokens) / count for mean in (done.wins, done.nearness))
            return self.balance_coef * len(wins) * (wins * nearness).sum()

        sow_loss(self, "compete_router_loss", lambda: self.router_coef * done.router, tokens)
        sow_loss(self, "compete_diversity_loss", lambda: self.diversity_coef * done.diversity, tokens)
        sow_loss(self, "compete_balance_loss", balance, tokens)
        if self.watch and not ctx.train:
            self._watch(x, done.plan, valid, ctx)
        return done.y.astype(x.dtype)

    def _drawn(self, seed: Int[Array, ""] | Array, ctx: Context) -> Bool[Array, ""]:
        """Whether the layer competes now: the same on every device and in every microbatch of a step."""
        if ctx.step is None:
            if self.schedule == "decaying":
                raise ConfigError("schedule='decaying' needs Context.step, the number of the training step")
            return jax.random.uniform(self.make_rng("router")) < self.rate
        rate = self.rate * (2 / (2 + jnp.sqrt(ctx.step + 1.0)) if self.schedule == "decaying" else 1)
        drawn = jax.random.uniform(jax.random.fold_in(jax.random.key(seed), ctx.step)) < rate
        return drawn & (ctx.step >= self.warmup)

    def _route(self, x: Array, logits: Array, valid: Array, ctx: Context) -> Outcome:
        plan = self._rule(logits, Context(valid=valid))
        y, plan, backend = run_plan(plan, experts_of(self.bank, x.shape[-1], ctx), x, self.backend)
        none = jnp.zeros(()), jnp.zeros(self.bank.num_experts)
        return Outcome(y, plan, backend, none[0], none[0], none[1], none[1])

    def _compete(self, x: Array, logits: Array, valid: Array, ctx: Context) -> Outcome:
        outputs, affinity = self._all(x, ctx)
        plan = self._winners(affinity, valid)
        y = jnp.einsum("bse,bseo->bso", plan.dense().astype(outputs.dtype), outputs)
        target = plan.dense() if self.target == "winners" else jax.nn.softmax(affinity, axis=-1)
        error = jnp.square(jax.nn.softmax(logits, axis=-1) - jax.lax.stop_gradient(target))
        winners = jnp.take_along_axis(error, plan.expert, axis=-1)
        similarity = _similarity(outputs, plan.expert)
        first = jax.lax.stop_gradient(jax.nn.one_hot(plan.expert[..., 0], affinity.shape[-1]))
        return Outcome(
            y,
            plan,
            jnp.asarray(backend_index("reference"), jnp.int32),
            router=masked_mean(error.mean(-1) + self.winners_coef * winners.mean(-1), valid, (0, 1)),
            diversity=masked_mean(similarity, valid, (0, 1)),
            wins=masked_mean(first, valid, (0, 1)),
            nearness=masked_mean(jax.nn.softmax(affinity, axis=-1), valid, (0, 1)),
        )

    def _all(self, x: Array, ctx: Context) -> tuple[Float[Array, "b s e o"], Float[Array, "b s e"]]:
        """Every expert's output on every token, and its affinity."""
        b, s, d = ctx.fit(x)
        rows = jnp.broadcast_to(x.reshape(1, b * s, d), (self.bank.num_experts, b * s, d))
        # On a mesh every device runs all experts on its own rows: said here, or the compiler moves rows about.
        outputs = experts_of(self.bank, d, ctx).run(constrain(rows, None, "batch", None), Batched())
        outputs = constrain(outputs, None, "batch", None).swapaxes(0, 1).reshape(b, s, self.bank.num_experts, -1)
        return outputs, AFFINITIES[self.affinity](outputs.astype(jnp.float32))

    def _winners(self, affinity: Float[Array, "b s e"], valid: Bool[Array, "b s"]) -> TokenPlan:
        share = self.gate == "share"
        rule = TopK(self.k, score="logit" if share else "softmax_selected", normalise=share, constant_gate=True)
        return rule(affinity, Context(valid=valid))

    def _watch(self, x: Array, plan: TokenPlan, valid: Array, ctx: Context) -> None:
        outputs, affinity = self._all(x, ctx)
        winners = self._winners(affinity, valid)
        shared = jnp.minimum(winners.assigned(), plan.assigned()).sum(-1) / self.k
        sow(self, "stats", "agreement", masked_mean(shared, valid, (0, 1)))
        pairs = self.k**2 / max(self.k * (self.k - 1), 1)  # of the mean over all k^2 pairs, those of two experts
        sow(self, "stats", "similarity", pairs * masked_mean(_similarity(outputs, winners.expert), valid, (0, 1)))

    @property
    def _rule(self) -> TopK:
        return TopK(self.k, normalise=self.k > 1)

    def active_fraction(self) -> float:
        """Share of the experts' parameters that a token uses, in router steps and at inference."""
        return self.k / self.bank.num_experts


def _similarity(outputs: Float[Array, "b s e o"], expert: Int[Array, "b s k"]) -> Float[Array, "b s"]:
    """Mean over all k^2 pairs of the cosine of the chosen experts' outputs, an output's with itself counted as 0."""
    chosen = jnp.take_along_axis(outputs.astype(jnp.float32), expert[..., None], axis=2)
    chosen = chosen * jax.lax.rsqrt(jnp.square(chosen).sum(-1, keepdims=True) + 1e-12)
    cosine = jnp.einsum("bsko,bslo->bskl", chosen, chosen) * (1 - jnp.eye(expert.shape[-1]))
    return cosine.mean((-1, -2))
