"""Tokens assigned to experts all together, so that no expert gets more than its share: BASE layers (Lewis et al. 2021) and Sinkhorn."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.core.errors import ConfigError
from moejax.routing.plan import TokenPlan, dropless
from moejax.routing.select.base import all_valid, selects


class SigmoidGated:
    """One expert per token, weighted by the sigmoid of its own logit; the gradient reaches a router only through that."""

    causal: ClassVar[bool] = False
    per_token: ClassVar[bool] = False
    num_outputs_per_expert: ClassVar[int] = 1
    needs_key: ClassVar[bool] = False

    def weigh(
        self,
        logits: Float[Array, "g n e"],
        expert: Int[Array, "g n k"],
        valid: Bool[Array, "g n"] | None = None,
        *,
        train: bool = False,
    ) -> TokenPlan:
        """The plan in which each token takes the given experts."""
        weight = jax.nn.sigmoid(jnp.take_along_axis(logits, expert, axis=-1))
        used = jnp.broadcast_to((all_valid(logits) if valid is None else valid)[..., None], expert.shape)
        return dropless(expert, weight, used, logits.shape[-1])

    def probabilities(self, logits: Float[Array, "g n e"]) -> Float[Array, "g n e"]:
        return jax.nn.softmax(logits, axis=-1)

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

    max_rounds: int = 500

    def __post_init__(self) -> None:
        if self.max_rounds < 1:
            raise ConfigError(f"max_rounds={self.max_rounds} must be at least 1")

    def __call__(
        self,
        logits: Float[Array, "g n e"],
        valid: Bool[Array, "g n"] | None = None,
        *,
        bias: Float[Array, "e"] | None = None,
        train: bool = False,
    ) -> TokenPlan:
        """The plan; see `Select`."""
        n, e = logits.shape[1:]
        real = all_valid(logits) if valid is None else valid
        scores = jax.lax.stop_gradient(logits if bias is None else logits + bias)
        expert = jax.vmap(functools.partial(auction, max_rounds=self.max_rounds))(scores, real)
        plan = self.weigh(logits, expert[..., None], valid)
        return plan.replace(capacity=-(-n // e), limit=-(-real.sum(1) // e))


@selects.register("sinkhorn")
@dataclasses.dataclass(frozen=True)
class Sinkhorn(SigmoidGated):
    """Each token's largest entry of the matrix to which Sinkhorn's iterations scale `exp(logits / temperature)`: rows sum to 1 and
    columns to equally much. Nearly balanced, not exactly, and dropless (Clark et al. 2022 choose their experts so).

    Attributes:
      iterations: each scales the columns, then the rows.
      temperature: the smaller, the closer to the best assignment and the slower to balance.
    """

    iterations: int = 20
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.temperature <= 0:
            raise ConfigError(f"iterations={self.iterations} and temperature={self.temperature} must be positive")

    def __call__(
        self,
        logits: Float[Array, "g n e"],
        valid: Bool[Array, "g n"] | None = None,
        *,
        bias: Float[Array, "e"] | None = None,
        train: bool = False,
    ) -> TokenPlan:
        """The plan; see `Select`."""
        real = (all_valid(logits) if valid is None else valid)[..., None]
        scores = jax.lax.stop_gradient(logits if bias is None else logits + bias) / self.temperature

        def scale(_: int | Array, x: Array) -> Array:
            x = x - jax.nn.logsumexp(x, axis=1, keepdims=True, where=real)
            return x - jax.nn.logsumexp(x, axis=2, keepdims=True)

        balanced = jax.lax.fori_loop(0, self.iterations, scale, jnp.where(real, scores, 0.0))
        return self.weigh(logits, balanced.argmax(-1)[..., None], valid)


# After this many rounds an expert keeps what it has won at its full value, and the auction ends sooner, if less exactly.
_RELAX_AFTER = 100


def auction(scores: Float[Array, "n e"], valid: Bool[Array, "n"], max_rounds: int = 500) -> Int[Array, "n"]:
    """The expert of each token under a nearly best balanced assignment: experts bid for tokens (Bertsekas 1992; BASE layers' solver).

    In each round every expert bids for as many tokens as it may have, those of the largest value to it, by how much each is worth
    above the next one, plus eps. A token goes to the highest bidder and becomes as much dearer. What an expert has won it keeps
    unless another one bids more. The sum of scores is within `n * eps` of the best, eps being a fiftieth of the scores' range.
    Everything is float32: with fewer bits, prices would stop rising.

    Invalid tokens get some expert. Where valid ones do not divide evenly, dummies that nobody values fill up.
    """
    n, e = scores.shape
    if e == 1:
        return jnp.zeros(n, jnp.int32)
    share = -(-valid.sum() // e)
    dummies = jnp.arange(e - 1) < share * e - valid.sum()
    active = jnp.concatenate([valid, dummies])
    worth, eps = _worth(scores.astype(jnp.float32), valid)
    worth = jnp.where(active, jnp.pad(worth, ((0, 0), (0, e - 1))), -jnp.inf)

    def one_round(state: tuple[Array, ...]) -> tuple[Array, ...]:
        owner, price, done, i = state
        own = owner == jnp.arange(e)[:, None]
        value = jnp.where(own, jnp.where(i <= _RELAX_AFTER, jnp.max(worth), worth), worth - price)
        wanted, following = _largest(value, share)
        bid = jnp.where(wanted, value - following[:, None] + eps, 0.0)
        bid = jnp.where(own & (i <= _RELAX_AFTER), eps, bid)
        best = bid.max(0)
        owner = jnp.where(best > 0, bid.argmax(0), -1)
        return owner, price + best, jnp.all((best > 0) | ~active), i + 1

    def unfinished(state: tuple[Array, ...]) -> Array:
        return ~state[2] & (state[3] < max_rounds)

    start = jnp.full(n + e - 1, -1), jnp.zeros(n + e - 1), ~valid.any(), jnp.int32(0)
    owner, *_ = jax.lax.while_loop(unfinished, one_round, start)
    return _fill(jnp.where(active, owner, -1), active, share, e)[:n].astype(jnp.int32)


def _worth(scores: Float[Array, "n e"], valid: Bool[Array, "n"]) -> tuple[Float[Array, "e n"], Float[Array, ""]]:
    """Scores above the smallest one, experts first, and eps; infinities and NaN count as the smallest."""
    known = valid[:, None] & jnp.isfinite(scores)
    low = jnp.min(scores, initial=jnp.inf, where=known)
    high = jnp.max(scores, initial=-jnp.inf, where=known)
    reach = jnp.where(known.any(), high - low, 0.0)
    return jnp.where(known, scores - low, 0.0).T, jnp.maximum(reach / 50, 1e-4)


def _largest(value: Float[Array, "e t"], share: Int[Array, ""]) -> tuple[Bool[Array, "e t"], Float[Array, "e"]]:
    """Which `share` tokens are of the largest value to each expert (the first among equals), and the next value after those."""
    ordered = -jnp.sort(-value, axis=1)
    least, following = (ordered[:, jnp.maximum(share - 1 + i, 0)] for i in (0, 1))
    above, equal = value > least[:, None], value == least[:, None]
    room = share - above.sum(1, keepdims=True)
    return above | (equal & (jnp.cumsum(equal, axis=1) <= room)), following


def _fill(owner: Int[Array, "t"], active: Bool[Array, "t"], share: Int[Array, ""], e: int) -> Int[Array, "t"]:
    """Tokens that nobody has won, in order, to experts that have room, in order."""
    room = jnp.cumsum(share - (owner[:, None] == jnp.arange(e)).sum(0))
    left = active & (owner < 0)
    place = jnp.cumsum(left) - 1
    to = jnp.searchsorted(room, place, side="right")
    return jnp.clip(jnp.where(left, to, owner), 0, e - 1)
