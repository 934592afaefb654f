"""Dense feed-forward layers and norms against NumPy, and shared experts, which run the same code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_layers import draw, glu, silu

from moejax import GLU, Context
from moejax.layers import DenseFFN, DenseGLU, LayerNorm, RMSNorm
from moejax.layers.ffn.dense import sum_shared
from moejax.layers.registry import ffns, norms

B, S, D = 2, 3, 6


def test_dense_layers_are_numpys(rng: np.random.Generator) -> None:
    x = rng.normal(size=(B, S, D))
    for layer in (DenseGLU(4), DenseFFN(4, activation="silu", use_bias=True)):
        variables = draw(layer, jnp.asarray(x, jnp.float32))
        p = {name: np.asarray(value[0], np.float64) for name, value in variables["params"]["expert"].items()}
        if isinstance(layer, DenseGLU):
            expected = glu(variables["params"]["expert"], 0, x)
        else:
            expected = silu(x @ p["w_in"] + p["b_in"]) @ p["w_out"] + p["b_out"]
        for ctx in (None, Context()):
            np.testing.assert_allclose(layer.apply(variables, jnp.asarray(x, jnp.float32), ctx), expected, rtol=1e-4, atol=1e-5)


def test_shared_experts_are_summed(rng: np.random.Generator) -> None:
    x, bank = rng.normal(size=(B, S, D)), GLU(4, num_experts=3)

    def run(module: GLU, x: jax.Array) -> jax.Array:
        return sum_shared(module, x, Context())

    shapes = jax.eval_shape(lambda key: bank.init(key, jnp.asarray(x, jnp.float32), method=run), jax.random.key(0))
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), shapes)
    y = bank.apply(params, jnp.asarray(x, jnp.float32), method=run)
    np.testing.assert_allclose(y, sum(glu(params["params"], e, x) for e in range(3)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_norms_are_numpys_with_float32_statistics(rng: np.random.Generator, dtype: str) -> None:
    # Large values with a small spread: bfloat16 statistics would be far off.
    x = jnp.asarray(rng.normal(size=(B, S, D)) + 30, dtype)
    exact = np.asarray(x, np.float64)
    scale, bias = rng.normal(size=D), rng.normal(size=D)
    params = {"norm": {"scale": jnp.asarray(scale, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}}
    tolerance = 1e-3 if dtype == "float32" else 0.02
    rms = RMSNorm(dtype=dtype).apply({"params": {"norm": {"scale": params["norm"]["scale"]}}}, x)
    expected = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-6) * scale
    np.testing.assert_allclose(np.asarray(rms, np.float32), expected, rtol=tolerance, atol=tolerance)
    layer = LayerNorm(dtype=dtype).apply({"params": params}, x)
    expected = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + 1e-6) * scale + bias
    np.testing.assert_allclose(np.asarray(layer, np.float32), expected, rtol=tolerance, atol=5 * tolerance)
    assert rms.dtype == layer.dtype == jnp.dtype(dtype)


def test_registered_kinds() -> None:
    assert {"ffn", "glu", "moe", "soft_moe"} <= set(ffns.kinds())
    assert {"rms_norm", "layer_norm"} <= set(norms.kinds())
    assert ffns.build(dict(kind="glu", hidden=4), where="ffn") == DenseGLU(4)
    assert norms.build(dict(kind="layer_norm", use_bias=False), where="norm", dtype="bfloat16") == LayerNorm(
        use_bias=False, dtype="bfloat16"
    )
