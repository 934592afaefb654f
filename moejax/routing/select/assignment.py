"""Tokens assigned to experts all together, so that no expert gets more than its share: BASE layers (Lewis et al. 2021) and Sinkhorn."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.core.context import Context
from moejax.core.fields import Count, Positive
from moejax.routing.plan import TokenPlan
from moejax.routing.scores import take
from moejax.routing.select.base import TokenChoice, selects


class SigmoidGated(TokenChoice):
    """One expert per token, weighted by the sigmoid of its own logit; the gradient reaches a router only through that."""

    def weights(
        self, logits: Float[Array, "g n e"], expert: Int[Array, "g n k"], wanted: Bool[Array, "g n k"], ctx: Context
    ) -> Float[Array, "g n k"]:
        return jax.nn.sigmoid(take(logits, expert))

    def mean_experts(self, num_experts: int) -> float:
        """Experts per token."""
        return 1.0


@selects.register("balanced_assignment")
@dataclasses.dataclass(frozen=True)
class BalancedAssignment(SigmoidGated):
    """The assignment with the largest sum of logits under which every expert of a group gets equally many tokens.

    Where they do not divide, an expert gets at most `ceil(tokens / e)`. No loss, no capacity and nothing to tune; but a token's
    expert depends on all tokens of its group, so at inference a layer takes `eval_select` top-1 with score 'sigmoid' instead.

    Attributes:
      max_rounds: of the auction, whose last tokens are then given to whoever has room; it rarely takes 100.
    """

    max_rounds: Count = 500

    def choose(
        self, logits: Float[Array, "g n e"], ctx: Context, bias: Float[Array, "e"] | None
    ) -> tuple[Int[Array, "g n 1"], Bool[Array, "g n 1"]]:
        scores = jax.lax.stop_gradient(logits if bias is None else logits + bias)
        expert = jax.vmap(functools.partial(auction, max_rounds=self.max_rounds))(scores, ctx.real(logits))[..., None]
        return expert, jnp.ones(expert.shape, bool)

    def plan(self, logits: Float[Array, "g n e"], ctx: Context, bias: Float[Array, "e"] | None) -> TokenPlan:
        """Has room for exactly what is assigned."""
        n, e = logits.shape[1:]
        plan = super().plan(logits, ctx, bias)
        return plan.replace(capacity=-(-n // e), limit=-(-ctx.real(logits).sum(1) // e))


@selects.register("sinkhorn")
@dataclasses.dataclass(frozen=True)
class Sinkhorn(SigmoidGated):
    """Each token's largest entry of the matrix to which Sinkhorn's iterations scale `exp(logits / temperature)`: rows sum to 1 and
    columns to equally much. Nearly balanced, not exactly, and dropless (Clark et al. 2022 choose their experts so).

    Attributes:
      iterations: each scales the columns, then the rows.
      temperature: the smaller, the closer to the best assignment and the slower to balance.
    """

    iterations: Count = 20
    temperature: Positive = 1.0

    def choose(
        self, logits: Float[Array, "g n e"], ctx: Context, bias: Float[Array, "e"] | None
    ) -> tuple[Int[Array, "g n 1"], Bool[Array, "g n 1"]]:
        real = ctx.real(logits)[..., None]
        scores = jax.lax.stop_gradient(logits if bias is None else logits + bias) / self.temperature

        def scale(_: int | Array, x: Array) -> Array:
            x = x - jax.nn.logsumexp(x, axis=1, keepdims=True, where=real)
            return x - jax.nn.logsumexp(x, axis=2, keepdims=True)

        balanced = jax.lax.fori_loop(0, self.iterations, scale, jnp.where(real, scores, 0.0))
        expert = balanced.argmax(-1)[..., None]
        return expert, jnp.ones(expert.shape, bool)


# What a bid is above what a token needs to bid, as a share of the scores' range: the auction's exactness, and its length.
EPS = 1 / 50


def auction(scores: Float[Array, "n e"], valid: Bool[Array, "n"], max_rounds: int = 500) -> Int[Array, "n"]:
    """The expert of each token under a nearly best balanced assignment: tokens bid for places (Bertsekas & Castanon 1989).

    In each round every token without a place bids for the expert that is worth most to it after its price, by as much as makes
    it indifferent to the second best, plus eps. An expert keeps the `share` highest bids; once it is full, its price is the lowest
    of them, and whoever is outbid bids anew. Prices start at the experts' mean scores, where tokens that are much alike already
    spread evenly. Once everybody has a place, no token would gain more than eps by another one: the sum of scores is within
    `share * e * eps` of the best, ties or not, eps being a fiftieth of the scores' range. Everything is float32: with fewer bits,
    prices would stop rising.

    Invalid tokens get some expert. Where valid ones do not divide evenly, dummies to whom all experts are alike fill up. After
    `max_rounds`, who is left gets a free place, and the bound no longer holds.
    """
    n, e = scores.shape
    if e == 1:
        return jnp.zeros(n, jnp.int32)
    share = -(-valid.sum() // e)
    dummies = jnp.arange(e - 1) < share * e - valid.sum()
    active = jnp.concatenate([valid, dummies])
    worth = _worth(scores.astype(jnp.float32), valid)
    reserve = worth.sum(0) / jnp.maximum(valid.sum(), 1)
    worth = jnp.pad(worth, ((0, e - 1), (0, 0)))

    def one_round(state: tuple[Array, ...]) -> tuple[Array, ...]:
        expert, bid, price, i = state
        value = worth - price
        first, second = jax.lax.top_k(value, 2)[0].T
        favourite, free = jnp.argmax(value, axis=1), expert < 0
        bid = jnp.where(free, price[favourite] + first - second + EPS, bid)
        expert = jnp.where(free, favourite, expert)
        offers = jnp.where(active & (expert == jnp.arange(e)[:, None]), bid, -jnp.inf)
        kept, lowest = _highest(offers, share)
        return jnp.where(kept.any(0), expert, -1), bid, jnp.where(jnp.isfinite(lowest), lowest, reserve), i + 1

    def unfinished(state: tuple[Array, ...]) -> Array:
        return jnp.any(active & (state[0] < 0)) & (state[3] < max_rounds)

    start = jnp.full(n + e - 1, -1), jnp.zeros(n + e - 1), reserve, jnp.int32(0)
    expert, *_ = jax.lax.while_loop(unfinished, one_round, start)
    return _fill(jnp.where(active, expert, -1), active, share, e)[:n].astype(jnp.int32)


def _worth(scores: Float[Array, "n e"], valid: Bool[Array, "n"]) -> Float[Array, "n e"]:
    """Valid tokens' scores between 0 and 1, the smallest and the largest of all; infinities and NaN count as the smallest."""
    known = valid[:, None] & jnp.isfinite(scores)
    low = jnp.min(scores, initial=jnp.inf, where=known)
    high = jnp.max(scores, initial=-jnp.inf, where=known)
    return jnp.where(known, (scores - low) / jnp.where(high > low, high - low, 1), 0)


def _highest(offers: Float[Array, "e t"], share: Int[Array, ""]) -> tuple[Bool[Array, "e t"], Float[Array, "e"]]:
    """Which offers are among an expert's `share` highest (the first among equals), and the lowest of these; -inf if there are fewer."""
    lowest = -jnp.sort(-offers, axis=1)[:, jnp.maximum(share - 1, 0)]
    above, equal = offers > lowest[:, None], offers == lowest[:, None]
    room = share - above.sum(1, keepdims=True)
    kept = above | (equal & (jnp.cumsum(equal, axis=1) <= room))
    return kept & jnp.isfinite(offers), lowest


def _fill(owner: Int[Array, "t"], active: Bool[Array, "t"], share: Int[Array, ""], e: int) -> Int[Array, "t"]:
    """Tokens without a place, in order, to experts that have room, in order."""
    room = jnp.cumsum(share - (owner[:, None] == jnp.arange(e)).sum(0))
    left = active & (owner < 0)
    place = jnp.cumsum(left) - 1
    to = jnp.searchsorted(room, place, side="right")
    return jnp.clip(jnp.where(left, to, owner), 0, e - 1)
