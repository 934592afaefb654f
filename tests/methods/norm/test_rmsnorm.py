"""RMSNorm and pRMSNorm (Zhang and Sennrich 2019): values and gradients of the formulas, what they are invariant to, and layer norm."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moejax as mj
from moejax.core.errors import ConfigError
from moejax.layers.registry import norms

D, EPS = 10, 1e-3


def apply(layer, x: np.ndarray, gain: np.ndarray) -> jax.Array:
    params = layer.init(jax.random.key(0), jnp.ones((1, len(gain))))["params"]
    return layer.apply({"params": jax.tree.map(lambda _: jnp.asarray(gain, jnp.float32), params)}, jnp.asarray(x, jnp.float32))


def rms_norm(x: np.ndarray, gain: np.ndarray, k: int) -> np.ndarray:
    y = np.zeros_like(x)
    for t, token in enumerate(x):
        y[t] = gain * token / math.sqrt(sum(a * a for a in token[:k]) / k + EPS)
    return y


def rms_norm_gradient(x: np.ndarray, gain: np.ndarray, k: int, dy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By inputs and gain: the first k features also change what all are divided by."""
    dx, dgain = np.zeros_like(x), np.zeros_like(gain)
    for t, token in enumerate(x):
        r = math.sqrt((token[:k] ** 2).mean() + EPS)
        dgain += dy[t] * token / r
        dx[t] = gain * dy[t] / r
        dx[t, :k] -= (dy[t] * gain * token).sum() * token[:k] / (k * r**3)
    return dx, dgain


@pytest.mark.parametrize(
    ("layer", "k"),
    [
        (mj.RMSNorm(epsilon=EPS), D),
        (mj.PartialRMSNorm(epsilon=EPS), 1),  # 6.25 % of 10, rounded up
        (mj.PartialRMSNorm(0.21, EPS), 3),
        (mj.PartialRMSNorm(0.7, EPS), 7),
        (mj.PartialRMSNorm(1.0, EPS), D),
    ],
)
def test_outputs_and_gradients_are_numpys(rng: np.random.Generator, layer, k: int) -> None:
    x, gain, weight = rng.normal(size=(5, D)) + 0.3, rng.normal(size=D), rng.normal(size=(5, D))
    np.testing.assert_allclose(apply(layer, x, gain), rms_norm(x, gain, k), rtol=1e-5, atol=1e-6)
    dx, dgain = jax.grad(lambda x, g: (weight * apply(layer, x, g)).sum(), (0, 1))(jnp.float32(x), jnp.float32(gain))
    for found, expected in zip((dx, dgain), rms_norm_gradient(x, gain, k, weight), strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("layer", [mj.RMSNorm(epsilon=0.0), mj.PartialRMSNorm(0.3, 0.0)])
def test_it_is_invariant_to_the_scale_of_inputs_and_weights_and_not_to_their_mean(rng: np.random.Generator, layer) -> None:
    x, w, gain = rng.normal(size=(5, 4)), rng.normal(size=(4, D)), rng.normal(size=D)
    y = apply(layer, x @ w, gain)
    np.testing.assert_allclose(apply(layer, 37.0 * (x @ w), gain), y, rtol=1e-5)
    assert np.abs(apply(layer, x @ w + 1.0, gain) - y).max() > 0.1
    # The gradient by a weight matrix falls as the matrix grows.
    slope = jax.grad(lambda w: jnp.sin(apply(layer, jnp.float32(x) @ w, gain)).sum())
    np.testing.assert_allclose(slope(jnp.float32(4 * w)), slope(jnp.float32(w)) / 4, rtol=1e-3, atol=1e-5)


def test_layer_norm_is_the_rms_norm_of_centred_inputs(rng: np.random.Generator) -> None:
    x, gain = rng.normal(size=(5, D)) + 2.0, rng.normal(size=D)
    centred = x - x.mean(-1, keepdims=True)
    expected = apply(mj.LayerNorm(EPS, use_bias=False), x, gain)
    np.testing.assert_allclose(apply(mj.RMSNorm(EPS), centred, gain), expected, rtol=1e-4, atol=1e-5)


def test_features_that_are_not_measured_change_nothing_but_themselves(rng: np.random.Generator) -> None:
    x, gain = rng.normal(size=(1, D)), np.ones(D)
    moved = x.copy()
    moved[0, 5] += 9.0
    before, after = (np.asarray(apply(mj.PartialRMSNorm(0.5), a, gain))[0] for a in (x, moved))
    np.testing.assert_array_equal(np.delete(after, 5), np.delete(before, 5))
    assert after[5] != before[5]


def test_half_precision_is_measured_in_float32(rng: np.random.Generator) -> None:
    """A sum of 2,048 squares in bfloat16 would stand still at 256 of them; rounding happens once, at the end."""
    x = jnp.asarray(rng.normal(size=(3, 4096)), jnp.bfloat16)
    layer = mj.PartialRMSNorm(0.5, dtype="bfloat16")
    y = layer.apply({"params": {"scale": jnp.ones(4096)}}, x)
    assert y.dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64)
    exact /= np.sqrt((exact[:, :2048] ** 2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_array_equal(np.asarray(y), np.asarray(jnp.asarray(exact, jnp.bfloat16)))


@pytest.mark.parametrize("fraction", [0.0, 1.5])
def test_a_share_that_is_none_is_refused(fraction: float) -> None:
    with pytest.raises(ConfigError, match=rf"model.norm.fraction={fraction} must be a number above 0 and of at most 1"):
        norms.build({"kind": "partial_rms_norm", "fraction": fraction}, "model.norm")
