"""From runs to words: a claim's quantity per seed, its mean, spread and 95 % interval, and the verdict they force.

The rule, for a claim that a quantity lies strictly between `low` and `high` (a difference below 0, say):

- *reproduced*: the whole interval lies between `low` and `high`, so beyond the margin in the claimed direction;
- *not reproduced*: the whole interval lies on the other side of a bound;
- *inconclusive*: the interval contains a bound; or there is only one seed, which has no interval at all; or a run diverged
  or did not measure the metric;
- *out of reach at this scale*: the claim says it needs the paper's scale (`needs`), or the preset is `smoke`, which checks
  shapes and finite losses only.

Differences are paired by seed: both arms of a pair saw the same data in the same order. The interval is Student's t on the
per-seed quantities.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from experiments.cache import Run
from experiments.study import Claim
from moejax.core.errors import nearest

REPRODUCED = "reproduced"
NOT_REPRODUCED = "not reproduced"
INCONCLUSIVE = "inconclusive"
OUT_OF_REACH = "out of reach at this scale"
WORDS = (REPRODUCED, NOT_REPRODUCED, INCONCLUSIVE, OUT_OF_REACH)
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Verdict:
    """What the runs say about a claim. `values` has the quantity once per seed of `seeds`; nan where it was not measured."""

    claim: Claim
    word: str
    reason: str
    seeds: tuple[int, ...]
    values: tuple[float, ...]
    mean: float
    std: float
    interval: tuple[float, float]


def judge(claim: Claim, runs: Mapping[str, Mapping[int, Run]], preset: str) -> Verdict:
    """The verdict on `claim` from `runs[arm][seed]`; every arm of the claim must be there."""
    seeds = tuple(sorted(set.intersection(*(set(runs[arm]) for arm in claim.arms))))
    values = tuple(_quantity(claim, {arm: runs[arm][seed] for arm in claim.arms}) for seed in seeds)
    mean, std, interval = summary(values)
    word, reason = _word(claim, values, interval, preset)
    if word == INCONCLUSIVE and not all(math.isfinite(v) for v in values):
        reason = _why_missing(claim, runs)
    return Verdict(claim, word, reason, seeds, values, mean, std, interval)


def summary(values: tuple[float, ...]) -> tuple[float, float, tuple[float, float]]:
    """Mean, sample standard deviation and t-interval of the mean; nan where there are too few values for it."""
    n = len(values)
    mean = float(np.mean(values)) if n else math.nan
    if n < 2 or not math.isfinite(mean):
        return mean, math.nan, (math.nan, math.nan)
    from scipy import stats

    std = float(np.std(values, ddof=1))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * std / math.sqrt(n)
    return mean, std, (mean - half, mean + half)


def speedup(fast: tuple[list[int], list[float]], slow: tuple[list[int], list[float]]) -> float:
    """How many times fewer steps the first curve `(steps, values)` needs than the second to reach the same value.

    The common value is the worse of the two final ones, so that both curves reach it. Lower is better if the curves fall
    and higher if they rise. Steps are interpolated linearly between logged points.
    """
    if not fast[0] or not slow[0] or not np.isfinite([*fast[1], *slow[1]]).all():
        return math.nan
    falls = slow[1][-1] <= slow[1][0]
    target = (max if falls else min)(fast[1][-1], slow[1][-1])
    return _first_reach(slow, target, falls) / _first_reach(fast, target, falls)


def _quantity(claim: Claim, runs: Mapping[str, Run]) -> float:
    if any(run.diverged for run in runs.values()):
        return math.nan
    if claim.measure == "speedup":
        return speedup(runs[claim.arm].curve(claim.metric), runs[claim.than].curve(claim.metric))
    value = runs[claim.arm].value(claim.metric)
    return value - runs[claim.than].value(claim.metric) if claim.than else value


def _word(claim: Claim, values: tuple[float, ...], interval: tuple[float, float], preset: str) -> tuple[str, str]:
    if preset == "smoke":
        return OUT_OF_REACH, "smoke only checks shapes and finite losses"
    if claim.needs and preset != "paper":
        return OUT_OF_REACH, claim.needs
    if not all(math.isfinite(v) for v in values):
        return INCONCLUSIVE, ""
    if len(values) < 2:
        return INCONCLUSIVE, f"rests on {len(values)} seed{'' if len(values) == 1 else 's'}"
    low, high = interval
    if claim.low < low and high < claim.high:
        return REPRODUCED, ""
    if high <= claim.low or claim.high <= low:
        return NOT_REPRODUCED, ""
    bound = claim.low if low <= claim.low <= high else claim.high
    return INCONCLUSIVE, f"the interval contains {bound:g}"


def _why_missing(claim: Claim, runs: Mapping[str, Mapping[int, Run]]) -> str:
    for arm in claim.arms:
        for seed, run in sorted(runs[arm].items()):
            if run.diverged:
                return f"'{arm}' diverged with seed {seed}"
            found = run.curve(claim.metric)[1] if claim.measure == "speedup" else run.matching(claim.metric)
            if not found:
                return f"'{arm}' did not measure '{claim.metric}'{nearest(claim.metric, run.metrics)}"
    return "a value is not finite"


def _first_reach(curve: tuple[list[int], list[float]], target: float, falls: bool) -> float:
    """The interpolated step at which a curve first reaches `target`."""
    steps, values = np.asarray(curve[0], float), np.asarray(curve[1], float)
    there = values <= target if falls else values >= target
    i = int(np.argmax(there))
    if i == 0:
        return max(float(steps[0]), 1.0)
    fraction = (values[i - 1] - target) / (values[i - 1] - values[i])
    return float(steps[i - 1] + fraction * (steps[i] - steps[i - 1]))
