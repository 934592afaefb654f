"""What a claim may be about: a number that is measured once per seed, of one arm or of several.

    Minus(Value("eval/loss", "sparse"), Value("eval/loss", Mean("dense_a", "dense_b")))

A quantity knows its `arms`, its `metrics`, how it reads (`words`), and its value `of` the runs of one seed. What is linear in an
evaluation also gives its value on each block of the evaluation set (`blocks`, see `experiments.decision`); what is not gives None.
A new form is a new class here, and most often a function in `experiments.study` that makes a claim of it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from experiments.cache import Run
from moejax.core.errors import ConfigError, nearest

Runs = Mapping[str, Run]  # arm -> its run with one seed


class Quantity(Protocol):
    """A number per seed."""

    @property
    def arms(self) -> tuple[str, ...]:
        """The arms that it needs."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that it reads."""

    @property
    def words(self) -> str:
        """What it is."""

    def of(self, runs: Runs) -> float:
        """Its value; nan where a run did not measure it or never came to it."""

    def blocks(self, runs: Runs) -> np.ndarray | None:
        """Its value on each block of the evaluation set."""

    def lacking(self, runs: Runs) -> str:
        """Why `of` is nan; empty if it is not for want of a measurement."""


@dataclass(frozen=True)
class Side:
    """One side of a comparison: an arm, or several as `how` says: 'mean', or of each seed the 'lowest' or 'highest' value.

    The best of several arms is picked anew with each seed, by the value that is judged, which favours the side with more arms.
    """

    names: tuple[str, ...]
    how: str = "mean"

    def __post_init__(self) -> None:
        if not self.names or len(set(self.names)) < len(self.names):
            raise ConfigError(f"{self.how} of {', '.join(self.names) or 'nothing'}: name one or more arms, each once")

    @property
    def words(self) -> str:
        return self.names[0] if len(self.names) == 1 else f"the {self.how} of {', '.join(self.names)}"

    def pick(self, values: list[float]) -> np.ndarray:
        """How much of each arm's value counts."""
        if self.how == "mean":
            return np.full(len(values), 1 / len(values))
        chosen = np.argmin(values) if self.how == "lowest" else np.argmax(values)
        return np.eye(len(values))[chosen]


def mean(*arms: str) -> Side:
    """The mean of several arms."""
    return Side(arms)


def lowest(*arms: str) -> Side:
    """Of several arms the lowest value, with each seed."""
    return Side(arms, "lowest")


def highest(*arms: str) -> Side:
    """Of several arms the highest value, with each seed."""
    return Side(arms, "highest")


def side(arms: str | Side) -> Side:
    """An arm's name as a side."""
    return Side((arms,)) if isinstance(arms, str) else arms


@dataclass(frozen=True)
class Value:
    """`metric` of an arm, or of several. A metric with `*` is the mean over the matching metrics."""

    metric: str
    at: Side

    @property
    def arms(self) -> tuple[str, ...]:
        return self.at.names

    @property
    def metrics(self) -> tuple[str, ...]:
        return (self.metric,)

    @property
    def words(self) -> str:
        return f"{self.metric} of {self.at.words}"

    def of(self, runs: Runs) -> float:
        values = [runs[arm].value(self.metric) for arm in self.arms]
        return math.nan if any(map(math.isnan, values)) else float(self.at.pick(values) @ np.array(values))

    def blocks(self, runs: Runs) -> np.ndarray | None:
        return _weighed(self.at.pick([runs[arm].value(self.metric) for arm in self.arms]), self.metric, self.arms, runs)

    def lacking(self, runs: Runs) -> str:
        return _unmeasured(self.metric, runs, [arm for arm in self.arms if not runs[arm].matching(self.metric)])


@dataclass(frozen=True)
class _OfTwo:
    """What is made of two quantities."""

    first: Quantity
    second: Quantity

    @property
    def arms(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.first.arms, *self.second.arms)))

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.first.metrics, *self.second.metrics)))

    def lacking(self, runs: Runs) -> str:
        return self.first.lacking(runs) or self.second.lacking(runs)


class Minus(_OfTwo):
    """`first - second`: of two values a difference, of two differences how much larger the first one is."""

    @property
    def words(self) -> str:
        if isinstance(self.first, Value) and isinstance(self.second, Value) and self.first.metric == self.second.metric:
            return f"{self.first.words} - {self.second.at.words}"
        wrap = (f"({each.words})" if isinstance(each, _OfTwo) else each.words for each in (self.first, self.second))
        return " - ".join(wrap)

    def of(self, runs: Runs) -> float:
        return self.first.of(runs) - self.second.of(runs)

    def blocks(self, runs: Runs) -> np.ndarray | None:
        first, second = self.first.blocks(runs), self.second.blocks(runs)
        return None if first is None or second is None or first.shape != second.shape else first - second


class Ratio(_OfTwo):
    """`first / second`, of steps or sizes."""

    @property
    def words(self) -> str:
        return f"{self.first.words} / {self.second.words}"

    def of(self, runs: Runs) -> float:
        below = self.second.of(runs)
        return self.first.of(runs) / below if below else math.nan

    def blocks(self, runs: Runs) -> None:
        return None


@dataclass(frozen=True)
class _OfCurve:
    """What is read off learning curves; evaluations are not linear in it, so it has no blocks."""

    metric: str

    @property
    def metrics(self) -> tuple[str, ...]:
        return (self.metric,)

    def blocks(self, runs: Runs) -> None:
        return None

    def lacking(self, runs: Runs) -> str:
        return _unmeasured(self.metric, runs, [arm for arm in self.arms if not runs[arm].curve(self.metric)[0]])


@dataclass(frozen=True)
class Speedup(_OfCurve):
    """How many times fewer steps `fast` needs than `slow` to reach the same value."""

    fast: str
    slow: str

    @property
    def arms(self) -> tuple[str, ...]:
        return (self.fast, self.slow)

    @property
    def words(self) -> str:
        return f"steps of {self.slow} / steps of {self.fast} to equal {self.metric}"

    def of(self, runs: Runs) -> float:
        return speedup(runs[self.fast].curve(self.metric), runs[self.slow].curve(self.metric))


@dataclass(frozen=True)
class StepsTo(_OfCurve):
    """Steps until an arm's `metric` first reaches `target`, interpolated between logged points; nan if it never does."""

    arm: str
    target: float

    @property
    def arms(self) -> tuple[str, ...]:
        return (self.arm,)

    @property
    def words(self) -> str:
        return f"steps of {self.arm} until {self.metric} is {self.target:g}"

    def of(self, runs: Runs) -> float:
        steps, values = runs[self.arm].curve(self.metric)
        if not steps or not np.isfinite(values).all():
            return math.nan
        falls = values[-1] <= values[0]
        reached = min(values) <= self.target if falls else max(values) >= self.target
        return first_reach((steps, values), self.target, falls) if reached else math.nan

    def lacking(self, runs: Runs) -> str:
        never = f"'{self.arm}' never reached {self.metric} {self.target:g}"
        return super().lacking(runs) or (never if math.isnan(self.of(runs)) else "")


@dataclass(frozen=True)
class _AlongArms:
    """What is fitted to `metric` of arms that stand at points of an axis."""

    metric: str
    points: Mapping[float, str] = field(hash=False)

    least = 2  # points that a fit needs

    def __post_init__(self) -> None:
        if len(self.points) < self.least or len(set(self.points.values())) < len(self.points):
            raise ConfigError(f"a fit of {self.metric} needs {self.least} or more arms, each once, not {dict(self.points)}")

    @property
    def arms(self) -> tuple[str, ...]:
        return tuple(self.points.values())

    @property
    def metrics(self) -> tuple[str, ...]:
        return (self.metric,)

    @property
    def _x(self) -> np.ndarray:
        return np.array(list(self.points), float)

    def _y(self, runs: Runs) -> np.ndarray:
        return np.array([runs[arm].value(self.metric) for arm in self.arms])

    def lacking(self, runs: Runs) -> str:
        return Value(self.metric, Side(self.arms)).lacking(runs)

    def blocks(self, runs: Runs) -> np.ndarray | None:
        return None


@dataclass(frozen=True)
class Trend(_AlongArms):
    """The least-squares slope of `metric` along arms; with `log`, per factor of 2 of the axis instead of per unit."""

    log: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.log and min(self.points) <= 0:
            raise ConfigError(
                f"a trend of {self.metric} in the logarithm of {min(self.points)}; take points above 0, or log=False"
            )

    @property
    def words(self) -> str:
        along = ", ".join(f"{arm} ({x:g})" for x, arm in self.points.items())
        return f"slope of {self.metric} {'per doubling ' if self.log else ''}along {along}"

    @property
    def _shares(self) -> np.ndarray:
        x = np.log2(self._x) if self.log else self._x
        x = x - x.mean()
        return x / (x @ x)

    def of(self, runs: Runs) -> float:
        return float(self._shares @ self._y(runs))

    def blocks(self, runs: Runs) -> np.ndarray | None:
        return _weighed(self._shares, self.metric, self.arms, runs)


class Optimum(_AlongArms):
    """The point of the axis at which a parabola in its logarithm is lowest: the best size at one budget of compute (isoFLOP).

    nan if the parabola opens downwards, or its lowest point lies outside the arms.
    """

    least = 3

    @property
    def words(self) -> str:
        return f"where {self.metric} is lowest along {', '.join(f'{arm} ({x:g})' for x, arm in self.points.items())}"

    def of(self, runs: Runs) -> float:
        x, y = np.log(self._x), self._y(runs)
        if not np.isfinite(y).all():
            return math.nan
        bend, slope, _ = np.polyfit(x, y, 2)
        best = -slope / (2 * bend) if bend > 0 else math.nan
        return math.exp(best) if x.min() <= best <= x.max() else math.nan

    def lacking(self, runs: Runs) -> str:
        outside = f"{self.metric} has no lowest point between {', '.join(self.arms)}" if math.isnan(self.of(runs)) else ""
        return super().lacking(runs) or outside


@dataclass(frozen=True)
class Gain(_AlongArms):
    """How many times the `cost` of `arm` the arms of `points` (cost -> arm) would need for its value.

    The logarithm of their cost is fitted as a polynomial of their value: a line, or a parabola through four arms or more. nan if the value
    lies outside theirs: nothing is extrapolated.
    """

    arm: str = ""
    cost: float = math.nan

    @property
    def arms(self) -> tuple[str, ...]:
        return (self.arm, *self.points.values())

    @property
    def words(self) -> str:
        return f"cost of {', '.join(self.points.values())} for {self.metric} of {self.arm} / its cost {self.cost:g}"

    def of(self, runs: Runs) -> float:
        curve = np.array([runs[arm].value(self.metric) for arm in self.points.values()])
        value = runs[self.arm].value(self.metric)
        if not np.isfinite(curve).all() or not curve.min() <= value <= curve.max():
            return math.nan
        fit = np.polyfit(curve, np.log(self._x), 1 if len(curve) < 4 else 2)
        return math.exp(np.polyval(fit, value)) / self.cost

    def lacking(self, runs: Runs) -> str:
        outside = f"{self.metric} of '{self.arm}' lies outside those of {', '.join(self.points.values())}"
        return super().lacking(runs) or (outside if math.isnan(self.of(runs)) else "")


def _weighed(shares: np.ndarray, metric: str, arms: tuple[str, ...], runs: Runs) -> np.ndarray | None:
    """The blocks of several arms, added up by their shares; None where an arm has none, or others."""
    found = [runs[arm].blocks(metric) for arm in arms]
    if any(each is None for each in found) or len({each.shape for each in found}) > 1:
        return None
    return shares @ np.stack(found)


def _unmeasured(metric: str, runs: Runs, arms: list[str]) -> str:
    """Names the first of the arms that did not measure a metric; empty if there is none."""
    return f"'{arms[0]}' did not measure '{metric}'{nearest(metric, runs[arms[0]].metrics)}" if arms else ""


def speedup(fast: tuple[list[int], list[float]], slow: tuple[list[int], list[float]]) -> float:
    """How many times fewer steps the first curve `(steps, values)` needs than the second to reach the same value.

    The common value is the worse of the two final ones, so that both curves reach it. Lower is better if the curves fall
    and higher if they rise. Steps are interpolated linearly between logged points.
    """
    if not fast[0] or not slow[0] or not np.isfinite([*fast[1], *slow[1]]).all():
        return math.nan
    falls = slow[1][-1] <= slow[1][0]
    target = (max if falls else min)(fast[1][-1], slow[1][-1])
    return first_reach(slow, target, falls) / first_reach(fast, target, falls)


def first_reach(curve: tuple[list[int], list[float]], target: float, falls: bool) -> float:
    """The interpolated step at which a curve first reaches `target`."""
    steps, values = np.asarray(curve[0], float), np.asarray(curve[1], float)
    there = values <= target if falls else values >= target
    i = int(np.argmax(there))
    if i == 0:
        return max(float(steps[0]), 1.0)
    fraction = (values[i - 1] - target) / (values[i - 1] - values[i])
    return float(steps[i - 1] + fraction * (steps[i] - steps[i - 1]))
