"""Samplers against the distributions that they are to draw from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.errors import ConfigError
from moejax.serve import Greedy, Temperature

LOGITS = np.array([0.0, 2.0, -1.0, 1.0, 1.5])
DRAWS = 4000


def frequencies(sampler):
    rows = jnp.broadcast_to(jnp.asarray(LOGITS, jnp.float32), (DRAWS, 5))
    tokens = np.asarray(jax.jit(sampler)(rows, jax.random.key(0)))
    return np.bincount(tokens, minlength=5) / DRAWS


def softmax(x):
    weight = np.exp(x - x.max())
    return weight / weight.sum()


@pytest.mark.parametrize(
    ("sampler", "kept", "temperature"),
    [
        (Temperature(), [0, 1, 2, 3, 4], 1.0),
        (Temperature(0.5), [0, 1, 2, 3, 4], 0.5),
        (Temperature(2.0, top_k=2), [1, 4], 2.0),
        (Temperature(top_p=0.7), [1, 4], 1.0),  # 0.46 and 0.28: the second one crosses 0.7
        (Temperature(top_p=0.47), [1, 4], 1.0),  # 0.463 alone is not enough
        (Temperature(top_p=0.46), [1], 1.0),
        (Temperature(0.5, top_k=3, top_p=0.9), [1, 4, 3], 0.5),  # 0.66 and 0.24 do not quite reach 0.9
        (Temperature(0.5, top_k=2, top_p=0.99), [1, 4], 0.5),
    ],
)
def test_frequencies_follow_the_cut_off_softmax(sampler, kept, temperature):
    expected = np.zeros(5)
    expected[kept] = softmax(LOGITS[kept] / temperature)
    np.testing.assert_allclose(frequencies(sampler), expected, atol=0.03)  # 4 standard errors of 4000 draws
    assert (frequencies(sampler)[expected == 0] == 0).all()


def test_greedy_takes_the_first_of_equal_maxima():
    tokens = Greedy()(jnp.array([[1.0, 3.0, 3.0], [0.0, 0.0, 0.0]]), jax.random.key(0))
    assert tokens.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(temperature=0.0), "use Greedy"),
        (dict(top_k=0), "top_k=0"),
        (dict(top_p=0.0), "top_p=0"),
        (dict(top_p=1.5), "top_p=1.5"),
    ],
)
def test_bad_samplers_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        Temperature(**fields)
