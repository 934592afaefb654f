"""From runs to words: a claim's quantity per seed, its interval, and the verdict they force.

The verdict on a claim is made by replaying its looks, in order, on the finished runs: the first look that decides is final, however many
seeds there are. The words:

- *reproduced*, *not reproduced*: decided at a look, by the rule of `experiments.decision`, which errs in 5 % of verdicts;
- *inconclusive*: no look decided (the reason says whether one is still to come), or a run diverged or did not measure the metric;
- *not matched*: the arms differ by more than 3 % in what the claim says that they have equally (`experiments.matching`);
- *by construction*: all seeds gave the same number to the last bit, so the claim is about the code and belongs into a test;
- *out of reach at this scale*: the claim says it needs the paper's scale (`needs`), or the preset is `smoke`, which checks shapes and
  finite losses only.

Quantities are paired by seed: arms of a seed saw the same data in the same order, and are evaluated on the same batches.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from experiments import matching
from experiments.boundaries import levels
from experiments.cache import Run
from experiments.decision import decide, estimate
from experiments.study import Claim

REPRODUCED = "reproduced"
NOT_REPRODUCED = "not reproduced"
INCONCLUSIVE = "inconclusive"
NOT_MATCHED = "not matched"
CONSTRUCTED = "by construction"
OUT_OF_REACH = "out of reach at this scale"
WORDS = (REPRODUCED, NOT_REPRODUCED, INCONCLUSIVE, NOT_MATCHED, CONSTRUCTED, OUT_OF_REACH)
SAME = 4  # seeds that must give the same number before it is no measurement


@dataclass(frozen=True)
class Verdict:
    """What the runs say about a claim.

    Attributes:
      seeds: those that it rests on; `values` has the quantity of each, nan where it was not measured.
      std: standard deviation over the seeds.
      interval: each end errs in 5 % of cases over all looks; nan before the first look.
      block_error: the part of the standard error that is the evaluation set's, which no seed makes smaller; nan where it is not known.
      needs: seeds at the next look; 0 if there is none to come.
    """

    claim: Claim
    word: str
    reason: str
    seeds: tuple[int, ...]
    values: tuple[float, ...]
    mean: float
    std: float
    interval: tuple[float, float] = (math.nan, math.nan)
    block_error: float = math.nan
    needs: int = 0


def judge(claim: Claim, runs: Mapping[str, Mapping[int, Run]], preset: str, looks: tuple[int, ...]) -> Verdict:
    """The verdict on `claim` from `runs[arm][seed]`, looking after `looks` seeds; every arm of the claim must be there."""
    rows = list(itertools.takewhile(bool, (_row(claim, runs, seed) for seed in range(looks[-1]))))
    values = np.array([_value(claim, row) for row in rows], float)
    blocks = _blocks(claim, rows)
    passed = [look for look in looks if look <= len(rows)]
    # The look that decides, or the last one; before the first, all that is there.
    used = int(decide(values, claim.low, claim.high, looks, blocks).seeds) if passed else len(rows)
    coming = next((look for look in looks if look > len(rows)), 0)
    evidence = _Evidence(rows[:used], values[:used], None if blocks is None else blocks[:used], looks)
    word, reason = _word(claim, evidence, preset)
    undecided = word == INCONCLUSIVE and not reason
    if undecided:
        reason = f"{len(rows)} of {coming} seeds for the next look" if coming else _undecided(claim, evidence)
    mean, std = summary(evidence.values)
    return Verdict(
        claim,
        word,
        reason,
        tuple(range(used)),
        tuple(map(float, evidence.values)),
        mean,
        std,
        evidence.interval,
        math.nan if blocks is None or used < 2 else float(estimate(evidence.values, evidence.blocks).block_error),
        coming if undecided else 0,
    )


def summary(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean and sample standard deviation; nan where there are too few values for it."""
    mean = float(np.mean(values)) if len(values) else math.nan
    return mean, float(np.std(values, ddof=1)) if len(values) > 1 and math.isfinite(mean) else math.nan


def _value(claim: Claim, row: dict[str, Run]) -> float:
    return math.nan if any(run.diverged for run in row.values()) else claim.quantity.of(row)


def _blocks(claim: Claim, rows: list[dict[str, Run]]) -> np.ndarray | None:
    """`[seed, block]`; None where a run has none, of before they were kept."""
    found = [None if any(run.diverged for run in row.values()) else claim.quantity.blocks(row) for row in rows]
    if not found or any(each is None for each in found) or len({each.shape for each in found}) > 1:
        return None
    return np.stack(found)


def _row(claim: Claim, runs: Mapping[str, Mapping[int, Run]], seed: int) -> dict[str, Run]:
    """The claim's runs of one seed; empty if one is missing."""
    return {arm: runs[arm][seed] for arm in claim.arms} if all(seed in runs[arm] for arm in claim.arms) else {}


@dataclass(frozen=True)
class _Evidence:
    """What a verdict rests on: the runs of each seed, the quantity of each, and on each block, up to one of the `looks`."""

    rows: list[dict[str, Run]]
    values: np.ndarray
    blocks: np.ndarray | None
    looks: tuple[int, ...]

    @property
    def at_look(self) -> bool:
        return len(self.values) in self.looks and len(self.values) > 1

    @property
    def interval(self) -> tuple[float, float]:
        if not self.at_look or not np.isfinite(self.values).all():
            return math.nan, math.nan
        level = levels(self.looks)[self.looks.index(len(self.values))]
        low, high = estimate(self.values, self.blocks).interval(level)
        return float(low), float(high)


def _word(claim: Claim, found: _Evidence, preset: str) -> tuple[str, str]:
    """The word and the reason; 'inconclusive' without a reason where the numbers have not decided."""
    values = found.values
    if preset == "smoke":
        return OUT_OF_REACH, "smoke only checks shapes and finite losses"
    if claim.needs and preset != "paper":
        return OUT_OF_REACH, claim.needs
    if found.rows and claim.matched and (reason := _unmatched(claim, found.rows[0])):
        return NOT_MATCHED, reason
    if not np.isfinite(values).all():
        return INCONCLUSIVE, _why_missing(claim, found.rows)
    if len(values) >= SAME and np.ptp(values) == 0:
        return CONSTRUCTED, f"all {len(values)} seeds gave exactly {values[0]:g}; that is a test, not a claim"
    decided = int(decide(values, claim.low, claim.high, found.looks, found.blocks).word) if found.at_look else 0
    return {1: REPRODUCED, -1: NOT_REPRODUCED, 0: INCONCLUSIVE}[decided], ""


def _undecided(claim: Claim, found: _Evidence) -> str:
    if not found.at_look:
        return f"rests on {len(found.values)} seed{'' if len(found.values) == 1 else 's'}"
    low, high = found.interval
    holding = [bound for bound in (claim.low, claim.high) if low <= bound <= high]
    if not holding:
        return "beyond a bound, but not by enough for a claim that has two"
    return f"the interval contains {holding[0]:g}"


def _unmatched(claim: Claim, row: dict[str, Run]) -> str:
    return matching.unmatched(claim.matched, matching.of_runs({arm: run for arm, run in row.items() if not run.diverged}))


def _why_missing(claim: Claim, rows: list[dict[str, Run]]) -> str:
    for arm in claim.arms:
        for seed, row in enumerate(rows):
            if row[arm].diverged:
                return f"'{arm}' diverged with seed {seed}"
    return next((why for row in rows if (why := claim.quantity.lacking(row))), "a value is not finite")
