"""Product-key top-k through the real TPU compiler."""

import jax
import jax.numpy as jnp
import pytest
from kernels.tpu import KINDS, compile_for, custom_calls

from pallas_kernels.product_keys import product_key_top_k

pytestmark = pytest.mark.tpu_aot


def shapes(n: int, h: int, s: int, dk: int, dtype: jnp.dtype) -> tuple[jax.ShapeDtypeStruct, ...]:
    return jax.ShapeDtypeStruct((n, h, 2, dk), dtype), jax.ShapeDtypeStruct((h, 2, s, dk), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_compiles_forward_and_backward(kind: str, dtype: jnp.dtype) -> None:
    """A quarter of a million keys for two heads; the gradient's program holds the forward kernel, once."""

    def loss(query: jax.Array, keys: jax.Array) -> jax.Array:
        return product_key_top_k(query, keys, 16)[0].sum()

    compiled = compile_for(kind, jax.value_and_grad(loss, (0, 1)), *shapes(512, 2, 512, 64, dtype))
    [name] = custom_calls(compiled)
    assert "product_key_top_k" in name


def test_compiles_odd_sizes() -> None:
    compiled = compile_for("v6e", lambda q, ks: product_key_top_k(q, ks, 5, "tpu"), *shapes(50, 3, 20, 10, jnp.float32))
    assert custom_calls(compiled) == ["product_key_top_k"]


def test_scores_of_half_keys_stay_in_vmem() -> None:
    """HBM traffic is less than one pass over the half scores that an unfused program writes, reads and sorts."""
    n, h, s, dk = 4096, 2, 1024, 64
    compiled = compile_for("v5e", lambda q, ks: product_key_top_k(q, ks, 16, "tpu"), *shapes(n, h, s, dk, jnp.bfloat16))
    assert compiled.cost_analysis()["bytes accessed"] < 4 * n * h * 2 * s
