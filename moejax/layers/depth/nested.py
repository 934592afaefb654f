"""Mixture of nested experts (Jain et al. 2024): one transformer, of which a token uses the first few features or all of them."""

import functools
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.core.carried import Declared, shared
from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.core.fields import Count, Fraction, In, Positive, Whole
from moejax.core.layer import Layer
from moejax.core.params import param
from moejax.core.sowing import sow
from moejax.experts.registry import ACTIVATIONS, Activation
from moejax.layers.depth.nested_budget import budget_capacities, expert_preferred, token_counts, widths
from moejax.layers.mixers.attention import attend, visible
from moejax.layers.registry import blocks, norms
from moejax.layers.routed import sow_routing
from moejax.parallel import constrain
from moejax.routing.losses.base import Routing, masked_mean
from moejax.routing.plan import dropless

Counts = tuple[int, ...]


@blocks.register("nested", slots={"norm": norms})
class Nested(Layer):
    """A pre-norm block in which a token of expert m reads and writes the first `d_m = d / 2^(E - m)` features only.

        q, k, v = x[:d_m] W[:d_m]     (full heads, so tokens of all widths attend to each other)
        x[:d_m] += attention W_o[:, :d_m]
        x[:d_m] += (alpha r + 1) act(x[:d_m] W_in[:d_m]) W_out[:, :d_m]

    All parameters are slices of the dense block's. Who gets which expert is decided once, before the first of these blocks, by
    one router (r = softmax(W_r x), of the assigned expert), and holds in all of them; alpha starts at 0. Tokens are sorted by
    expert and every expert has a fixed number of them, so narrow tokens really cost less.

    Attributes:
      num_heads: of attention.
      hidden: of the feed-forward layer.
      norm: over all features; made twice.
      num_experts: E.
      budgets: mean width of a token as a share of d (e_c). Of several, training draws one a step.
      eval_budget: the budget outside training; needed where there are several.
      capacities: each expert's share of the tokens, narrowest first, instead of what the budget's program gives. With one expert
        for all tokens the block has no router: a dense network of that width.
      pretrain_steps: in the first steps of training all tokens have one width, drawn anew each step (MatFormer).
      delta, beta: of the program, see `budget_capacities`.
      choice: who gets which expert is 'learned', or 'random', the control.
      activation: of the feed-forward layer; 'gelu' is the tanh form, 'gelu_exact' PyTorch's default.
    """

    counts_padding: ClassVar[bool] = True  # how many tokens an expert has is part of the program

    num_heads: Count
    hidden: Count
    norm: nn.Module
    num_experts: Annotated[int, In(1, 32)] = 4
    budgets: tuple[Positive, ...] = (0.5,)
    eval_budget: Positive | None = None
    capacities: tuple[Fraction, ...] | None = None
    pretrain_steps: Whole = 0
    delta: float = 2.0
    beta: Positive = 10.0
    choice: Literal["learned", "random"] = "learned"
    activation: Activation = "gelu"

    def __post_init__(self) -> None:
        if self.eval_budget is None and len(self.budgets) != 1:
            raise ConfigError(f"budgets={self.budgets} leaves open what to evaluate at; set eval_budget")
        given = self.capacities
        if given is not None and (len(given) != self.num_experts or abs(sum(given) - 1) > 1e-3):
            raise ConfigError(f"capacities={given} must be num_experts={self.num_experts} numbers from 0 to 1 that sum to 1")
        self._plans(train=True), self._plans(train=False)  # solved here, once; refuses what has no solution
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"], ctx: Context) -> Float[Array, "b s d"]:
        b, s, d = ctx.fit(x)
        self._check_width(d)
        kernel = functools.partial(param, self, init=nn.initializers.lecun_normal())
        w = {name: kernel(name, shape=(d, d), axes=("embed", "heads")).astype(x.dtype) for name in "qkv"}
        w["o"] = kernel("o", shape=(d, d), axes=("heads", "embed")).astype(x.dtype)
        w["in"] = kernel("w_in", shape=(d, self.hidden), axes=("embed", "mlp")).astype(x.dtype)
        w["out"] = kernel("w_out", shape=(self.hidden, d), axes=("mlp", "embed")).astype(x.dtype)
        alpha = param(self, "alpha", nn.initializers.zeros, (), ())

        route = self._route(x, ctx)
        order = jnp.argsort(route["expert"], axis=1, stable=True)
        rows, inner = _permute(x, order), ctx.map_tokens(lambda a: _permute(a, order))
        everywhere = jnp.broadcast_to(jnp.arange(s), (b, s))
        mask = visible(everywhere, everywhere, False, None, inner.valid, inner.segments, inner.segments)
        by_plan = functools.partial(self._by_plan, route["plan"], ctx.train, s)

        h = self.norm.copy(name="mixer_norm")(rows)
        rows = rows + by_plan(self._attention, h, w, mask)
        h = self.norm.copy(name="ffn_norm")(rows)
        gate = 1 + alpha * _permute(route["weight"], order)[..., None]
        rows = rows + gate.astype(x.dtype) * by_plan(self._feed_forward, h, w)
        return _permute(rows, jnp.argsort(order, axis=1))

    def _attention(
        self, counts: Counts, x: Float[Array, "b s d"], w: dict[str, Array], mask: Bool[Array, "b s s"]
    ) -> Float[Array, "b s d"]:
        heads = (*x.shape[:2], self.num_heads, x.shape[-1] // self.num_heads)
        q, k, v = (constrain(_read(counts, x, w[n]).reshape(heads), "batch", "seq", "heads", None) for n in "qkv")
        return _write(counts, attend(q, k, v, mask).reshape(x.shape), w["o"])

    def _feed_forward(self, counts: Counts, x: Float[Array, "b s d"], w: dict[str, Array]) -> Float[Array, "b s d"]:
        return _write(counts, ACTIVATIONS[self.activation](_read(counts, x, w["in"])), w["out"])

    def _route(self, x: Float[Array, "b s d"], ctx: Context) -> dict[str, Array]:
        """Every token's expert, what its output is weighted with, and which plan holds: as the first block decided."""
        b, s, _ = x.shape
        start = self._undecided(b, s)
        if self._dense():
            route = {**start, "expert": jnp.full((b, s), jnp.argmax(jnp.array(self._plans(False)[0])), jnp.int32)}
        else:
            before = ctx.recall("nested_experts", start)
            declared = self.shares(x.shape[-1])
            w = shared(self, ctx, "nested_router", declared)["w"] if declared else None
            keys = jax.random.split(self.make_rng("router") if ctx.train else jax.random.key(0), 3)
            decide = functools.partial(self._decide, ctx=ctx)
            if ctx.carried is None:
                route = decide(x, w, keys)
            else:
                route = jax.lax.cond(before["expert"].min() < 0, decide, lambda *_: before, x, w, keys)
            ctx.remember("nested_experts", route)
        expert, valid = route["expert"][..., None], jnp.ones((b, s), bool) if ctx.valid is None else ctx.valid
        used = valid[..., None]
        plan = dropless(expert, route["weight"][..., None], used, self.num_experts)
        sow_routing(self, Routing(route["logits"], jax.nn.softmax(route["logits"]), plan, valid), ())
        sow(self, "stats", "width", masked_mean(jnp.array(widths(self.num_experts))[route["expert"]], valid, (0, 1)))
        return route

    def _decide(self, x: Float[Array, "b s d"], w: Float[Array, "d e"] | None, keys: Array, ctx: Context) -> dict[str, Array]:
        b, s, _ = x.shape
        if w is None:
            logits = jax.random.normal(keys[0], (b, s, self.num_experts))
        else:
            logits = jnp.einsum("bsd,de->bse", x.astype(jnp.float32), w, precision=jax.lax.Precision.HIGHEST)
        probs = jax.nn.softmax(logits, axis=-1)
        plan = self._draw_plan(keys[1:], ctx) if ctx.train else jnp.int32(0)

        def assign(counts: Counts) -> tuple[Int[Array, "b s"], Float[Array, "b s"]]:
            expert = expert_preferred(probs, counts, ctx.valid)
            weight = jnp.take_along_axis(probs, expert[..., None], axis=-1)[..., 0]
            return expert, weight if max(counts) < s else jnp.zeros_like(weight)  # one width for all is no choice

        plan = jnp.broadcast_to(plan, (b, s))
        expert, weight = self._by_plan(plan, ctx.train, s, assign)
        return {"expert": expert, "weight": weight, "plan": plan, "logits": logits}

    def _draw_plan(self, keys: Array, ctx: Context) -> Int[Array, ""]:
        """This step's plan: one of the uniform ones while pretraining, afterwards one of the budgets'."""
        uniform = self.num_experts if self.pretrain_steps else 0
        plan = uniform + jax.random.randint(keys[0], (), 0, len(self._plans(True)) - uniform)
        if not uniform or ctx.step is None:
            return plan
        return jnp.where(ctx.step < self.pretrain_steps, jax.random.randint(keys[1], (), 0, uniform), plan)

    def _by_plan(self, plan: Int[Array, "b s"], train: bool, tokens: int, function: Callable[..., Any], *args: Any) -> Any:
        """`function(counts, *args)` with the counts of the plan that holds; each has a program of its own."""
        branches = [functools.partial(function, token_counts(capacities, tokens)) for capacities in self._plans(train)]
        return branches[0](*args) if len(branches) == 1 else jax.lax.switch(plan.max(), branches, *args)

    def _plans(self, train: bool) -> tuple[tuple[float, ...], ...]:
        """Every expert's share of the tokens, for each plan that may hold."""
        budgets = self.budgets if train or self.eval_budget is None else (self.eval_budget,)
        plans = tuple(budget_capacities(budget, self.num_experts, self.delta, self.beta) for budget in budgets)
        if self.capacities is not None:
            plans = (tuple(map(float, self.capacities)),)
        if train and self.pretrain_steps:
            plans = (*(tuple(float(m == i) for i in range(self.num_experts)) for m in range(self.num_experts)), *plans)
        return plans

    def _dense(self) -> bool:
        """Whether there is nothing to decide: every token has the same width in training and evaluation."""
        return all(len(plans) == 1 and max(plans[0]) == 1 for plans in (self._plans(True), self._plans(False)))

    def _undecided(self, b: int, s: int) -> dict[str, Array]:
        zeros = jnp.zeros((b, s))
        logits = jnp.zeros((b, s, self.num_experts))
        return {"expert": jnp.full((b, s), -1, jnp.int32), "weight": zeros, "plan": zeros.astype(jnp.int32), "logits": logits}

    def _check_width(self, d: int) -> None:
        narrowest = 2 ** (self.num_experts - 1)
        if d % narrowest or d % self.num_heads:
            raise ConfigError(
                f"d_model={d} in {'/'.join(self.path)} must be a multiple of num_heads={self.num_heads} and of {narrowest}, "
                f"which num_experts={self.num_experts} nested widths divide it by"
            )

    def carries(self, b: int, s: int) -> dict[str, dict[str, Array]]:
        """The decision, before anybody has made it."""
        return {} if self._dense() else {"nested_experts": self._undecided(b, s)}

    def shares(self, width: int) -> dict[str, dict[str, Declared]]:
        """The one router."""
        if self._dense() or self.choice == "random":
            return {}
        init = nn.initializers.lecun_normal()
        return {"nested_router": {"w": (init, (width, self.num_experts), ("embed", None))}}

    def check_causal(self, where: str) -> None:
        """Experts choose among all tokens of a sequence: always refused in a decoder."""
        raise ConfigError(f"{where} (nested) chooses among all tokens and leaks the future in a decoder; use it in a vit")

    def decodable(self) -> str | None:
        return "nested experts choose among all tokens of a sequence"


def _read(counts: Counts, x: Float[Array, "b s d"], w: Float[Array, "d f"]) -> Float[Array, "b s f"]:
    """`x[:d_m] W[:d_m]` of tokens sorted by expert."""
    return _by_expert(counts, lambda rows, width: rows[..., :width] @ w[:width], x, w.shape[0])


def _write(counts: Counts, x: Float[Array, "b s f"], w: Float[Array, "f d"]) -> Float[Array, "b s d"]:
    """`x W[:, :d_m]`, with zeros beyond."""

    def write(rows: Float[Array, "b n f"], width: int) -> Float[Array, "b n d"]:
        return jnp.pad(rows @ w[:, :width], ((0, 0), (0, 0), (0, w.shape[1] - width)))

    return _by_expert(counts, write, x, w.shape[1])


def _by_expert(counts: Counts, function: Callable[[Array, int], Array], x: Float[Array, "b s d"], width: int) -> Array:
    parts, start = [], 0
    for m, count in enumerate(counts):
        if count:
            parts.append(function(x[:, start : start + count], width >> (len(counts) - 1 - m)))
        start += count
    return jnp.concatenate(parts, axis=1)


def _permute(x: Array, order: Int[Array, "b s"]) -> Array:
    """`x[b, s, ...]` with each row's tokens in this order."""
    return jnp.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), axis=1)
