"""Verdicts against numbers worked out by hand and an independent t-interval."""

import math

import pytest
from toy_studies import make_runs

from experiments.cache import Run
from experiments.quantities import Speedup, speedup
from experiments.study import Claim, above, below, faster, higher, lower, within
from experiments.verdict import INCONCLUSIVE, NOT_REPRODUCED, OUT_OF_REACH, REPRODUCED, judge

# With one look at 3 seeds an end of the interval errs in 5 %: 2.920 is that quantile of Student's t with 2 degrees of freedom.
LOOK = (3,)
# b - a is 0.0, -0.2, -0.4 by seed: mean -0.2, std 0.2, half-width 2.920 * 0.2 / sqrt(3) = 0.3372, interval [-0.5372, 0.1372].
WIDE = make_runs(a=[1.0, 2.0, 3.0], b=[1.0, 1.8, 2.6])
# b - a is -0.20, -0.21, -0.22: mean -0.21, std 0.01, half-width 0.01686, interval [-0.2269, -0.1931]. To refute a claim with two bounds
# each is held against 4.303 * 0.01 / sqrt(3) = 0.02484.
TIGHT = make_runs(a=[1.0, 2.0, 3.0], b=[0.8, 1.79, 2.78])


@pytest.mark.parametrize(
    ("claim", "runs", "word"),
    [
        (lower("m", "b", "a"), WIDE, INCONCLUSIVE),
        (lower("m", "b", "a"), TIGHT, REPRODUCED),
        (lower("m", "b", "a", by=0.19), TIGHT, REPRODUCED),
        (lower("m", "b", "a", by=0.2), TIGHT, INCONCLUSIVE),
        (lower("m", "b", "a", by=0.24), TIGHT, NOT_REPRODUCED),
        (lower("m", "a", "b"), TIGHT, NOT_REPRODUCED),
        (higher("m", "a", "b"), TIGHT, REPRODUCED),
        (higher("m", "a", "b", by=0.3), TIGHT, NOT_REPRODUCED),
        (higher("m", "b", "a"), TIGHT, NOT_REPRODUCED),
        (within("m", "a", "b", 0.25), TIGHT, REPRODUCED),
        (within("m", "a", "b", 0.2), TIGHT, INCONCLUSIVE),
        (within("m", "a", "b", 0.1), TIGHT, NOT_REPRODUCED),
        (above("m", "a", 0.0), make_runs(a=[5.0, 5.1, 5.2]), REPRODUCED),
        (above("m", "a", 5.1), make_runs(a=[5.0, 5.1, 5.2]), INCONCLUSIVE),
        (below("m", "a", 4.0), make_runs(a=[5.0, 5.1, 5.2]), NOT_REPRODUCED),
        (within("m", "a", "b", 0.19), TIGHT, INCONCLUSIVE),  # the interval lies outside, but not by enough for two bounds
    ],
)
def test_words_follow_the_rule(claim, runs, word):
    assert judge(claim, runs, "cpu", LOOK).word == word


def test_numbers_of_a_verdict_are_paired_by_seed():
    verdict = judge(lower("m", "b", "a"), WIDE, "cpu", LOOK)
    assert verdict.values == pytest.approx((0.0, -0.2, -0.4))
    assert verdict.mean == pytest.approx(-0.2)
    assert verdict.std == pytest.approx(0.2)
    assert verdict.interval == pytest.approx((-0.5372, 0.1372), abs=1e-4)
    assert verdict.seeds == (0, 1, 2)
    assert "contains 0" in verdict.reason


def test_only_seeds_of_both_arms_count():
    runs = make_runs(a=[1.0, 2.0, 3.0], b=[0.8, 1.79])
    assert judge(lower("m", "b", "a"), runs, "cpu", LOOK).seeds == (0, 1)


@pytest.mark.parametrize("claim", [lower("m", "b", "a"), lower("m", "a", "b"), above("m", "a", 0.0)])
def test_one_seed_is_never_reproduced_nor_refuted(claim):
    verdict = judge(claim, make_runs(a=[1.0], b=[0.5]), "cpu", (1,))
    assert verdict.word == INCONCLUSIVE
    assert verdict.reason == "rests on 1 seed"


def test_smoke_and_claims_that_need_the_papers_scale_are_out_of_reach():
    claim = lower("m", "b", "a", needs="paper scale because 8 experts cannot show it")
    assert judge(lower("m", "b", "a"), TIGHT, "smoke", LOOK).word == OUT_OF_REACH
    assert judge(claim, TIGHT, "cpu", LOOK).word == OUT_OF_REACH
    assert judge(claim, TIGHT, "cpu", LOOK).reason == "paper scale because 8 experts cannot show it"
    assert judge(claim, TIGHT, "paper", LOOK).word == REPRODUCED


def test_a_diverged_run_or_a_missing_metric_is_inconclusive_and_says_so():
    runs = {**make_runs(a=[1.0, 1.0]), "b": {0: Run("b", 0, {"m": 0.5}), 1: Run("b", 1, {"m": 0.5}, diverged="at step 3")}}
    verdict = judge(lower("m", "b", "a"), runs, "cpu", LOOK)
    assert (verdict.word, verdict.reason) == (INCONCLUSIVE, "'b' diverged with seed 1")
    verdict = judge(lower("n", "b", "a"), make_runs(a=[1.0, 1.0], b=[0.5, 0.4]), "cpu", LOOK)
    assert verdict.word == INCONCLUSIVE
    assert verdict.reason.startswith("'b' did not measure 'n'; valid names: m")


def test_a_metric_with_a_star_is_the_mean_over_its_matches():
    run = Run("a", 0, {"stats/x/drop": 0.1, "stats/y/drop": 0.3, "stats/y/load": 9.0})
    assert run.value("stats/*/drop") == pytest.approx(0.2)
    assert run.value("stats/x/drop") == pytest.approx(0.1)
    assert math.isnan(run.value("stats/z/drop"))


def test_speedup_is_the_ratio_of_steps_to_the_same_value():
    # The slow curve ends at 2 after 100 steps; the fast one passes 2 half way between 20 (3.0) and 40 (1.0): at 30.
    slow, fast = ([20, 40, 100], [4.0, 3.0, 2.0]), ([20, 40, 100], [3.0, 1.0, 0.5])
    assert speedup(fast, slow) == pytest.approx(100 / 30)
    assert speedup(slow, fast) == pytest.approx(30 / 100)
    rising = ([10, 20], [0.1, 0.5]), ([10, 20], [0.1, 0.3])
    assert speedup(*rising) == pytest.approx(20 / 15)
    assert math.isnan(speedup(([], []), slow))


def test_faster_is_judged_on_the_speedups_of_seeds():
    def run(arm: str, seed: int, values: list[float]) -> Run:
        history = [{"step": s, "m": v} for s, v in zip((20, 40, 100), values, strict=True)]
        return Run(arm, seed, {"m": values[-1]}, history)

    runs = {
        "a": {s: run("a", s, [4.0, 3.0, 2.0]) for s in range(3)},
        "b": {s: run("b", s, [3.0, 1.0 + s / 100, 0.5]) for s in range(3)},
    }
    verdict = judge(faster("m", "b", "a", by=2.0), runs, "cpu", LOOK)
    assert verdict.word == REPRODUCED
    assert verdict.values[0] == pytest.approx(100 / 30)
    assert judge(faster("m", "b", "a", by=4.0), runs, "cpu", LOOK).word == NOT_REPRODUCED
    assert judge(Claim(Speedup("n", "b", "a"), low=1.0), runs, "cpu", LOOK).reason.startswith("'b' did not measure 'n'")
