"""The rule that decides claims, tried on thousands of made-up studies: how often it errs, and how often it finds what is there."""

import math

import numpy as np
import pytest
from scipy import stats

from experiments import boundaries
from experiments.boundaries import HEADLINE_LOOKS, LOOKS, TABLE, levels, p_values, simulate, spent
from experiments.decision import decide, estimate

STUDIES = 10_000
MARGIN = 3 * math.sqrt(0.05 * 0.95 / STUDIES)  # of a share of 5 % among so many studies
SCHEDULES = (LOOKS, HEADLINE_LOOKS, (5,), (2, 3), (3, 8))
INF = math.inf


def seeds(looks, mean, rng, studies=STUDIES):
    return mean + rng.standard_normal((studies, looks[-1]))


@pytest.mark.parametrize("looks", SCHEDULES, ids=str)
@pytest.mark.parametrize(
    ("low", "high", "mean"),
    # Where each error is most likely: at a bound. At a bound itself a claim is wrong, for it says 'strictly'.
    [(-INF, 0, 0), (0, INF, 0), (-1, 1, 1), (-1, 1, -1), (-4, 4, 4), (-0.05, 0.05, 0.05)],
    ids=str,
)
def test_a_wrong_claim_is_reproduced_in_at_most_5_per_cent_of_studies(looks, low, high, mean):
    found = decide(seeds(looks, mean, np.random.default_rng(0)), low, high, looks)
    assert (found.word == 1).mean() <= 0.05 + MARGIN


@pytest.mark.parametrize("looks", SCHEDULES, ids=str)
@pytest.mark.parametrize(
    ("low", "high", "mean"),
    [(-INF, 0, -1e-9), (0, INF, 1e-9), (-1, 1, 1 - 1e-9), (-4, 4, 4 - 1e-9), (-0.05, 0.05, 0), (-0.05, 0.05, 0.0499)],
    ids=str,
)
def test_a_right_claim_is_refuted_in_at_most_5_per_cent_of_studies(looks, low, high, mean):
    found = decide(seeds(looks, mean, np.random.default_rng(1)), low, high, looks)
    assert (found.word == -1).mean() <= 0.05 + MARGIN


@pytest.mark.parametrize(
    ("looks", "effect", "power", "used"),
    # What docs/studies_and_verdicts.md says; effects in standard deviations over seeds.
    [
        (HEADLINE_LOOKS, 0.5, 0.43, 11.5),
        (HEADLINE_LOOKS, 1.0, 0.92, 8.6),
        (HEADLINE_LOOKS, 1.5, 1.00, 6.2),
        (LOOKS, 0.5, 0.24, 5.7),
        (LOOKS, 1.0, 0.59, 5.3),
        (LOOKS, 1.5, 0.87, 4.8),
        (LOOKS, 2.0, 0.98, 4.3),
    ],
)
def test_power_is_what_the_docs_say(looks, effect, power, used):
    found = decide(seeds(looks, effect, np.random.default_rng(2)), 0, INF, looks)
    assert (found.word == 1).mean() == pytest.approx(power, abs=0.02)
    assert found.seeds.mean() == pytest.approx(used, abs=0.15)


@pytest.mark.parametrize("looks", [LOOKS, HEADLINE_LOOKS], ids=str)
@pytest.mark.parametrize(
    ("blocks", "of_seeds", "of_blocks", "rest"), [(8, 1, 1, 1), (12, 0.1, 2, 1), (12, 1, 0.3, 3), (32, 0, 1, 0.3)]
)
def test_with_an_evaluation_set_that_was_drawn_too_the_error_is_the_same(looks, blocks, of_seeds, of_blocks, rest):
    rng = np.random.default_rng(3)
    n, studies = looks[-1], 4_000
    drawn = [
        scale * rng.standard_normal((studies, *shape))
        for scale, shape in ((of_seeds, (n, 1)), (of_blocks, (1, blocks)), (rest, (n, blocks)))
    ]
    values = sum(drawn)
    found = decide(values.mean(-1), 0, INF, looks, values)
    assert (found.word == 1).mean() <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / studies)
    assert (found.word == -1).mean() <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / studies)
    blind = decide(values.mean(-1), 0, INF, looks)
    if of_blocks > of_seeds:
        assert (blind.word != 0).mean() > 0.4, "without the blocks half of all verdicts are wrong: the test can fail"


def test_the_variance_of_the_mean_is_that_of_the_two_way_table():
    """Against the textbook's mean squares of a table of seeds and blocks: (MS_seed + MS_block - MS_rest) / (n B)."""
    rng = np.random.default_rng(4)
    n, count = 5, 7
    table = rng.standard_normal((n, 1)) + 2 * rng.standard_normal((1, count)) + 0.5 * rng.standard_normal((n, count))
    grand = table.mean()
    ms_seed = count * sum((row.mean() - grand) ** 2 for row in table) / (n - 1)
    ms_block = n * sum((column.mean() - grand) ** 2 for column in table.T) / (count - 1)
    rest = sum((table[i, j] - table[i].mean() - table[:, j].mean() + grand) ** 2 for i in range(n) for j in range(count))
    ms_rest = rest / ((n - 1) * (count - 1))
    found = estimate(table.mean(1), table)
    assert float(found.error) ** 2 == pytest.approx((ms_seed + ms_block - ms_rest) / (n * count))
    assert float(found.seed_error) ** 2 == pytest.approx(ms_seed / (n * count))
    parts = float(found.seed_error) ** 4 / (n - 1) + float(found.block_error) ** 4 / (count - 1)
    assert float(found.freedom) == pytest.approx(float(found.error) ** 4 / parts)


def test_more_seeds_do_not_shrink_what_the_evaluation_set_adds():
    rng = np.random.default_rng(5)
    shared = 2 * rng.standard_normal((1, 10))
    errors = [float(estimate(v.mean(1), v).error) for n in (4, 400) for v in [0.1 * rng.standard_normal((n, 1)) + shared]]
    assert errors[1] == pytest.approx(shared.std(ddof=1) / math.sqrt(10), rel=0.02)
    assert errors[0] == pytest.approx(errors[1], rel=0.05)


def test_noise_between_blocks_that_differs_from_seed_to_seed_adds_nothing_twice():
    """Without an effect of blocks, the variance is that of the seeds' means, whatever the spread within a seed."""
    values = 3 * np.random.default_rng(6).standard_normal((20_000, 6, 8))
    found = estimate(values.mean(-1), values)
    assert np.mean(found.error**2) == pytest.approx(9 / 48, rel=0.35)
    assert np.all(found.error >= found.seed_error)


@pytest.mark.parametrize(("looks", "error"), TABLE, ids=str)
def test_the_table_spends_the_error_in_proportion_to_seeds(looks, error):
    p, paths = p_values(looks, 400_000, seed=9), 400_000
    crossed = p <= np.array(levels(looks, error))[:, None]
    for k, allowed in enumerate(spent(looks, error)):
        share = crossed[: k + 1].any(0).mean()
        assert share == pytest.approx(allowed, abs=4 * math.sqrt(allowed / paths) + 2e-4)


def test_other_schedules_are_simulated_and_one_look_is_the_plain_test():
    assert levels((7,)) == (0.05,)
    found = simulate((4, 6), paths=200_000, seed=3)
    assert found == pytest.approx(TABLE[LOOKS, 0.05], abs=2e-3)
    assert boundaries.spent((4, 6, 10)) == pytest.approx((0.02, 0.03, 0.05))


# Quantiles of Student's t from a printed table: the two-sided 90 % one of 3 degrees of freedom is 2.353.
def test_one_look_is_students_t_test():
    values = np.array([-0.1, -0.2, -0.3, -0.2])
    low, high = estimate(values).interval(0.05)
    half = 2.353 * np.std(values, ddof=1) / 2
    assert (float(low), float(high)) == (pytest.approx(-0.2 - half, abs=1e-4), pytest.approx(-0.2 + half, abs=1e-4))
    word = decide(values, -INF, 0, (4,)).word
    assert (int(word) == 1) == (stats.ttest_1samp(values, 0, alternative="less").pvalue < 0.05)


def test_the_first_look_that_decides_is_final():
    values = np.array([-1.0, -1.1, -0.9, -1.0, 9.0, 9.0, 9.0, 9.0])
    found = decide(values, -INF, 0, (4, 6, 8))
    assert (int(found.word), int(found.seeds)) == (1, 4)
    later = decide(values[::-1].copy(), -INF, 0, (4, 6, 8))
    assert (int(later.word), int(later.seeds)) == (-1, 4)
    assert int(decide(values[:3], -INF, 0, (4, 6, 8)).seeds) == 0
