"""What all implementations of the router share: the rule, the scores, and exact top-k by rounds of maxima.

The functions take the axis that experts lie on: rows of tokens suit XLA and Triton, columns of tokens suit a TPU's vectors. They
keep to what all three compilers know: elementwise operations and reductions.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

LOWEST = float(jnp.finfo(jnp.float32).min)


class Rule(NamedTuple):
    """The static part of a call of `route`."""

    k: int
    score: str
    normalise: bool


class Routed(NamedTuple):
    """Where tokens go.

    Attributes:
      expert: chosen experts, in falling order of what they were chosen by.
      weight: their scores; with `normalise` divided by their sum.
      logits: of all experts.
      counts: how many choices of valid tokens each expert got.
      importance: each expert's score summed over valid tokens.
      z: logsumexp of each token's logits.
    """

    expert: Int[Array, "n k"]
    weight: Float[Array, "n k"]
    logits: Float[Array, "n e"]
    counts: Int[Array, "e"]
    importance: Float[Array, "e"]
    z: Float[Array, "n"]


class Score(NamedTuple):
    """How logits become scores.

    Attributes:
      of: scores of logits[n, e].
      of_some: the same of any logits, given the maximum of their token's logits and the sum of exponentials relative to it.
      gradient: from scores[n, e] and the gradient to them, the gradient to the logits.
    """

    of: Callable[[Array], Array]
    of_some: Callable[[Array, Array, Array], Array]
    gradient: Callable[[Array, Array], Array]


SCORES = {
    "softmax": Score(
        jax.nn.softmax,
        lambda logits, top, total: jnp.exp(logits - top) / total,
        lambda scores, d: scores * (d - (scores * d).sum(-1, keepdims=True)),
    ),
    "sigmoid": Score(
        jax.nn.sigmoid,
        lambda logits, top, total: jax.nn.sigmoid(logits),
        lambda scores, d: d * scores * (1 - scores),
    ),
}


class Choice(NamedTuple):
    """What `choose` finds out about a tile of tokens; lists have k entries, of size 1 along the experts' axis."""

    expert: list[Array]
    weight: list[Array]
    chosen: Array
    scores: Array
    z: Array


TopK = Callable[[Array, int, int, Array], tuple[list[Array], list[Array]]]


def choose(
    logits: Float[Array, "..."],
    bias: Float[Array, "..."] | None,
    rule: Rule,
    axis: int,
    top_k: TopK | None = None,
    num_experts: int | None = None,
) -> Choice:
    """Scores and the k best experts of a tile of logits.

    Args:
      logits: of a tile of tokens, two axes.
      bias: broadcasts against the logits; changes the choice only.
      rule: k, score, normalise.
      axis: of the experts.
      top_k: how to find the best; `top_k_by_rounds` by default.
      num_experts: where fewer than the size of `axis`, what lies beyond is padding.
    """
    index = jax.lax.broadcasted_iota(jnp.int32, logits.shape, axis)
    real = index < (logits.shape[axis] if num_experts is None else num_experts)
    logits = jnp.where(real, logits, -jnp.inf)
    top = jnp.max(logits, axis=axis, keepdims=True)
    total = jnp.sum(jnp.exp(logits - top), axis=axis, keepdims=True)
    score = SCORES[rule.score]
    scores = score.of_some(logits, top, total)
    # Logits rather than scores where possible: a saturated softmax rounds different logits to equal scores.
    rank = jnp.where(real, jnp.maximum(logits if bias is None else scores + bias, LOWEST), -jnp.inf)
    best, expert = (top_k or top_k_by_rounds)(rank, rule.k, axis, index)
    if bias is None:
        weight = [score.of_some(value, top, total) for value in best]
    else:
        weight = [jnp.sum(jnp.where(index == i, scores, 0), axis=axis, keepdims=True) for i in expert]
    if rule.normalise:
        whole = sum(weight) + 1e-20
        weight = [one / whole for one in weight]
    chosen = (rank > best[-1]) | ((rank == best[-1]) & (index <= expert[-1]))
    return Choice(expert, weight, chosen, scores, top + jnp.log(total))


def top_k_by_rounds(
    rank: Float[Array, "..."], k: int, axis: int, index: Int[Array, "..."]
) -> tuple[list[Float[Array, "..."]], list[Int[Array, "..."]]]:
    """The k largest values along an axis and their indices, in falling order; equal values in rising order of index.

    Exact and vectorised, with work in proportion to k: the way for small k, and the only way inside a kernel.

    Args:
      rank: finite where there is something to choose from, -inf elsewhere.
      k: how many.
      axis: along which.
      index: of each entry; distinct along the axis.
    """
    highest = jnp.iinfo(jnp.int32).max
    values, picks = [], []
    for _ in range(k):
        best = jnp.max(rank, axis=axis, keepdims=True)
        pick = jnp.min(jnp.where(rank == best, index, highest), axis=axis, keepdims=True)
        rank = jnp.where(index == pick, -jnp.inf, rank)
        values.append(best)
        picks.append(pick)
    return values, picks


def columns_of(
    parts: list[Float[Array, "n 1"] | Int[Array, "n 1"]], size: int
) -> Float[Array, "n size"] | Int[Array, "n size"]:
    """Columns side by side by selects, as in a Triton kernel, which cannot concatenate; what lies beyond them is zero."""
    column = jnp.arange(size)[None]
    tile = jnp.zeros((parts[0].shape[0], size), parts[0].dtype)
    for r, part in enumerate(parts):
        tile = jnp.where(column == r, part, tile)
    return tile


def float32_parts(x: Array, w: Array) -> Array:
    """`w` as parts[p, d, e] such that `sum_p dot(x, part_p)` with float32 accumulation is exact to float32.

    A bfloat16 product is exact in float32, so bfloat16 tokens need three bfloat16 parts of a float32 `w` (8 bits of its mantissa
    each): three fast passes where a float32 product takes six. Smallest part first, as they are summed.
    """
    if x.dtype != jnp.bfloat16 or w.dtype == jnp.bfloat16:
        return w.astype(jnp.promote_types(x.dtype, w.dtype))[None]
    # Not `astype`, of which the compiler may cancel pairs.
    high = jax.lax.reduce_precision(w.astype(jnp.float32), exponent_bits=8, mantissa_bits=7)
    middle = jax.lax.reduce_precision(w - high, exponent_bits=8, mantissa_bits=7)
    return jnp.stack([w - high - middle, middle, high]).astype(jnp.bfloat16)
