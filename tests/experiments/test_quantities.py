"""What claims may be about, against values worked out by hand, NumPy and scipy."""

import math

import numpy as np
import pytest
from scipy import optimize, stats

from experiments.cache import Run
from experiments.quantities import Gain, Minus, Optimum, Ratio, Side, StepsTo, Trend, Value, highest, lowest, mean
from experiments.study import changes_less, gains, optimum, sooner, trend
from experiments.verdict import REPRODUCED, judge


def one_seed(blocks=None, **values):
    """Arm -> its run; `blocks[arm]` are the values of 'm' on blocks."""
    history = lambda arm: [{"step": 9, "m": values[arm], **({"m/blocks": blocks[arm]} if blocks else {})}]  # noqa: E731
    return {arm: Run(arm, 0, {"m": value}, history(arm)) for arm, value in values.items()}


RUNS = one_seed(a=1.0, b=4.0, c=2.5, d=3.0)


@pytest.mark.parametrize(
    ("quantity", "value"),
    [
        (Value("m", mean("a", "b", "c")), 2.5),
        (Value("m", lowest("a", "b", "c")), 1.0),
        (Value("m", highest("a", "b", "c")), 4.0),
        (Minus(Value("m", Side(("a",))), Value("m", lowest("b", "c"))), -1.5),
        (changes_less("m", ("a", "b"), ("c", "d")).quantity, (4.0 - 1.0) - (3.0 - 2.5)),
        (Ratio(Value("m", Side(("b",))), Value("m", Side(("a",)))), 4.0),
    ],
)
def test_values_of_several_arms(quantity, value):
    assert quantity.of(RUNS) == pytest.approx(value)


@pytest.mark.parametrize("log", [False, True])
def test_a_trend_is_the_least_squares_slope(log):
    points = {2: "a", 8: "b", 4: "c", 16: "d"}
    x = np.array(list(points), float)
    slope = stats.linregress(np.log2(x) if log else x, [1.0, 4.0, 2.5, 3.0]).slope
    assert Trend("m", points, log).of(RUNS) == pytest.approx(slope)


def test_blocks_of_what_is_linear_are_the_quantity_on_each_block():
    rng = np.random.default_rng(0)
    blocks = {arm: rng.standard_normal(5).tolist() for arm in "abc"}
    runs = one_seed(blocks, **{arm: float(np.mean(values)) for arm, values in blocks.items()})
    x, y = np.array([1.0, 2.0, 5.0]), np.array([blocks[arm] for arm in "abc"])
    best = np.argmin(y.mean(1))
    for quantity, expected in [
        (Trend("m", dict(zip(x, "abc", strict=True))), [stats.linregress(x, column).slope for column in y.T]),
        (Minus(Value("m", Side(("a",))), Value("m", mean("b", "c"))), y[0] - (y[1] + y[2]) / 2),
        (Value("m", lowest("a", "b", "c")), y[best]),
    ]:
        np.testing.assert_allclose(quantity.blocks(runs), expected)
        assert np.mean(quantity.blocks(runs)) == pytest.approx(quantity.of(runs))
    assert Value("m", Side(("a",))).blocks(RUNS) is None


def test_steps_to_a_target_are_interpolated_and_may_never_come():
    def runs(**curves):
        return {
            arm: Run(arm, 0, {"m": v[-1]}, [{"step": s, "m": x} for s, x in zip((20, 40, 100), v, strict=True)])
            for arm, v in curves.items()
        }

    both = runs(a=[4.0, 3.0, 2.0], b=[3.0, 1.0, 0.5])
    assert StepsTo("m", "a", 2.5).of(both) == pytest.approx(70)
    assert StepsTo("m", "b", 2.5).of(both) == pytest.approx(25)
    assert sooner("m", "b", "a", 2.5).quantity.of(both) == pytest.approx(70 / 25)
    never = sooner("m", "b", "a", 1.0).quantity
    assert math.isnan(never.of(both))
    assert never.lacking(both) == "'a' never reached m 1"
    assert StepsTo("m", "a", 0.35).of(runs(a=[0.1, 0.3, 0.4])) == pytest.approx(70)


def test_the_best_size_is_where_a_parabola_in_its_logarithm_is_lowest():
    loss = lambda size: 2.0 + 0.3 * (math.log(size) - math.log(20.0)) ** 2  # noqa: E731
    points = {5.0: "a", 10.0: "b", 40.0: "c", 60.0: "d"}
    runs = one_seed(**{arm: loss(size) for size, arm in points.items()})
    assert Optimum("m", points).of(runs) == pytest.approx(20.0)
    rising = one_seed(a=1.0, b=2.0, c=2.5, d=2.6)
    assert math.isnan(Optimum("m", points).of(rising))
    assert "has no lowest point between a, b, c, d" in Optimum("m", points).lacking(rising)
    noisy = one_seed(a=2.6, b=2.1, c=2.2, d=2.3)
    bend, slope, level = optimize.curve_fit(
        lambda x, p, q, r: p * x**2 + q * x + r, np.log(list(points)), [2.6, 2.1, 2.2, 2.3]
    )[0]
    lowest_there = optimize.minimize_scalar(lambda x: bend * x**2 + slope * x + level, bounds=(1, 5), method="bounded").x
    assert Optimum("m", points).of(noisy) == pytest.approx(math.exp(lowest_there), rel=1e-4)


def test_the_gain_is_how_much_more_the_dense_curve_costs_for_the_same_value():
    # Dense: the loss falls by 0.5 with every doubling of its cost, so 2.25 costs 2 ** 1.5.
    dense = {1.0: "a", 2.0: "b", 4.0: "c"}
    runs = one_seed(a=3.0, b=2.5, c=2.0, moe=2.25)
    assert Gain("m", dense, "moe", 1.4).of(runs) == pytest.approx(2**1.5 / 1.4)
    beyond = one_seed(a=3.0, b=2.5, c=2.0, moe=1.9)
    assert math.isnan(Gain("m", dense, "moe", 1.4).of(beyond)), "nothing is extrapolated"
    assert "lies outside those of a, b, c" in Gain("m", dense, "moe", 1.4).lacking(beyond)


def test_every_form_is_judged_over_seeds():
    rng = np.random.default_rng(1)

    def run(arm, seed, value):
        return Run(arm, seed, {"m": value}, [{"step": 1, "m": 3.0}, {"step": 100, "m": value}])

    truth = {"a": 2.6, "b": 2.2, "c": 2.1, "d": 2.4, "moe": 2.3}
    runs = {arm: {s: run(arm, s, v + 0.002 * rng.standard_normal()) for s in range(4)} for arm, v in truth.items()}
    points = {1.0: "a", 2.0: "b", 4.0: "c", 8.0: "d"}
    for claim in (
        trend("m", points, high=0),
        optimum("m", points, low=2.0, high=5.0),
        gains("m", "moe", 1.0, {1.0: "a", 2.0: "b", 4.0: "c"}, by=1.5),
        changes_less("m", ("a", "c"), ("b", "d")),
        sooner("m", "c", "a", 2.7, by=1.2),
    ):
        assert judge(claim, runs, "cpu", (4,)).word == REPRODUCED, claim.sentence
