"""The rule by which seeds decide a claim: a pure function of arrays, with any leading axes, so that a test can try it 10,000 times.

A claim says that a quantity lies strictly between `low` and `high`. After each look there is a mean over the seeds so far, its standard
error, and a one-sided Student t test of each bound at the level of that look (`experiments.boundaries`):

- *reproduced* (+1) if the mean is beyond every bound that the claim has, each tested at the look's level. Where the claim is wrong, the
  quantity is beyond one of them, whose test errs in at most 5 % of cases over all looks. (Both bounds: the two one-sided tests of
  equivalence, Schuirmann 1987.)
- *not reproduced* (-1) if the mean is on the wrong side of a bound. A claim with two bounds may be refuted wrongly at both, so each is
  tested at half the error.

A claim is either true or not, so only one of the two errors can be made: 5 % is the error of a verdict.

The standard error has two parts. `values[n]` is the quantity of each seed; `blocks[n, b]`, where there are any, the same quantity on
each block of the evaluation set, whose mean over blocks is `values`. All seeds are evaluated on the same blocks. With

    blocks[i, b] = mu + seed_i + block_b + rest_ib

the mean over `n` seeds and `B` blocks has the variance  V(seed) / n + V(block) / B + V(rest) / (n B). The sample variance of `values`
estimates V(seed) + V(rest) / B, so divided by n it is the first term and the last: what further seeds make smaller. The sample
variance over blocks of the mean over seeds estimates V(block) + V(rest) / n. Less the residual mean square over n, which is V(rest) / n,
and divided by B, it is the term in the middle, which no number of seeds makes smaller: another evaluation set would have given another
number. It is taken as 0 where it comes out negative, so a verdict is never surer than the seeds alone make it. Degrees of freedom of
the sum are Welch's and Satterthwaite's.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from experiments.boundaries import ERROR, levels


class Estimate(NamedTuple):
    """Mean of a quantity, its standard error in the two parts, and the degrees of freedom of their sum."""

    mean: Float[np.ndarray, "..."]
    seed_error: Float[np.ndarray, "..."]
    block_error: Float[np.ndarray, "..."]
    freedom: Float[np.ndarray, "..."]

    @property
    def error(self) -> Float[np.ndarray, "..."]:
        """The whole standard error."""
        return np.hypot(self.seed_error, self.block_error)

    def interval(self, level: float) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]:
        """Both ends, each of which errs with probability `level`."""
        from scipy import stats

        half = stats.t.isf(level, self.freedom) * self.error
        return self.mean - half, self.mean + half


class Decision(NamedTuple):
    """+1 reproduced, -1 not reproduced, 0 open; and the number of seeds at the look that decided, or at the last one."""

    word: Int[np.ndarray, "..."]
    seeds: Int[np.ndarray, "..."]


def estimate(values: Float[np.ndarray, "... n"], blocks: Float[np.ndarray, "... n b"] | None = None) -> Estimate:
    """What `n` seeds, at least two, say of the mean."""
    n = values.shape[-1]
    mean = values.mean(-1)
    seeds = values.var(-1, ddof=1) / n
    if blocks is None or blocks.shape[-1] < 2:
        return Estimate(mean, np.sqrt(seeds), np.zeros_like(seeds), np.full_like(seeds, n - 1.0))
    count = blocks.shape[-1]
    of_block = blocks.mean(-2)
    rest = blocks - of_block[..., None, :] - blocks.mean(-1, keepdims=True) + blocks.mean((-2, -1), keepdims=True)
    residual = (rest**2).sum((-2, -1)) / ((n - 1) * (count - 1))
    shared = np.maximum(of_block.var(-1, ddof=1) - residual / n, 0.0) / count
    parts = seeds**2 / (n - 1) + shared**2 / (count - 1)
    freedom = np.divide((seeds + shared) ** 2, parts, out=np.full_like(seeds, n - 1.0), where=parts > 0)
    return Estimate(mean, np.sqrt(seeds), np.sqrt(shared), freedom)


def test(found: Estimate, low: float, high: float, look: int, looks: tuple[int, ...]) -> Int[np.ndarray, "..."]:
    """What one look says: +1, -1 or 0."""
    if look < 2:
        return np.zeros_like(found.mean, dtype=int)
    sure = levels(looks)[looks.index(look)]
    two = np.isfinite(low) and np.isfinite(high)
    surer = levels(looks, ERROR / 2)[looks.index(look)] if two else sure
    (left, right), (far_left, far_right) = found.interval(sure), found.interval(surer)
    inside = (low < left) & (right < high)
    outside = (far_right <= low) | (high <= far_left)
    return np.where(inside, 1, np.where(outside, -1, 0))


def decide(
    values: Float[np.ndarray, "... n"],
    low: float,
    high: float,
    looks: tuple[int, ...],
    blocks: Float[np.ndarray, "... n b"] | None = None,
) -> Decision:
    """Replays the looks that `n` seeds allow; the first that decides is final."""
    word = np.zeros(values.shape[:-1], int)
    seeds = np.zeros(values.shape[:-1], int)
    for look in (look for look in looks if look <= values.shape[-1]):
        found = estimate(values[..., :look], None if blocks is None else blocks[..., :look, :]) if look > 1 else None
        now = test(found, low, high, look, looks) if found else 0
        undecided = word == 0
        word = np.where(undecided, now, word)
        seeds = np.where(undecided, look, seeds)
    return Decision(word, seeds)
