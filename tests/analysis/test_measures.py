"""Measures of routing against SciPy and hand counts."""

import numpy as np
import pytest
from scipy import stats

from moejax.analysis import balance, entropy, favourites, mutual_information, preferences, specialisation


def test_mutual_information_is_what_the_entropies_leave(rng: np.random.Generator) -> None:
    label, expert = rng.integers(0, 3, 500), rng.integers(0, 5, 500)
    expert = np.where(rng.random(500) < 0.5, label, expert)
    counts = np.zeros((3, 5))
    np.add.at(counts, (label, expert), 1)
    apart = stats.entropy(counts.sum(1), base=2) + stats.entropy(counts.sum(0), base=2)
    bits = apart - stats.entropy(counts.ravel(), base=2)
    np.testing.assert_allclose(mutual_information(counts), bits, rtol=1e-9)
    np.testing.assert_allclose(specialisation(counts), bits / entropy(counts.sum(1)), rtol=1e-9)


def test_specialisation_runs_from_nothing_to_everything() -> None:
    assert specialisation(np.outer([3.0, 5.0], [1.0, 2.0, 3.0])) == pytest.approx(0, abs=1e-12)
    assert specialisation(np.diag([3.0, 5.0, 1.0])) == pytest.approx(1)
    assert specialisation(np.eye(4)[[0, 1, 1]] * 7) < 1, "two domains share an expert"
    assert np.isnan(specialisation(np.ones((1, 4)))), "one label leaves nothing to tell"


def test_balance() -> None:
    assert balance(np.full(8, 0.125)) == pytest.approx(1)
    assert balance(np.eye(8)[3]) == pytest.approx(0)
    assert balance(np.array([0.5, 0.5, 0, 0])) == pytest.approx(0.5)


def test_preferences_and_favourites() -> None:
    counts = np.array([[8.0, 2.0], [10.0, 10.0], [0.0, 3.0]])
    overall = np.array([18, 15]) / 33
    np.testing.assert_allclose(preferences(counts), counts / counts.sum(1, keepdims=True) / overall)
    assert [label for label, _ in favourites(counts, 1)] == [1], "rare labels are left out"
    assert [label for label, _ in favourites(counts, 1, least=3.0)] == [2, 1]
    assert favourites(counts, 0)[0] == (0, pytest.approx(0.8 / overall[0]))
