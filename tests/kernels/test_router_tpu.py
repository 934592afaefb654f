"""The fused router through the real TPU compiler."""

import jax
import jax.numpy as jnp
import pytest
from kernels.tpu import KINDS, compile_for, custom_calls

from pallas_kernels.router import route

pytestmark = pytest.mark.tpu_aot
N, D, E, K = 512, 2048, 64, 4


def loss(x: jax.Array, w: jax.Array, bias: jax.Array, implementation: str) -> jax.Array:
    routed = route(x, w, K, "sigmoid", bias, normalise=True, implementation=implementation)
    return routed.weight.sum() + routed.importance.sum() + routed.z.sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_compiles_forward_and_backward(kind: str, dtype: jnp.dtype) -> None:
    """The gradient's program holds the forward kernel, once, and XLA's matmuls."""
    shapes = [jax.ShapeDtypeStruct(s, t) for s, t in (((N, D), dtype), ((D, E), jnp.float32), ((E,), jnp.float32))]
    compiled = compile_for(kind, jax.value_and_grad(lambda *a: loss(*a, "auto"), (0, 1)), *shapes)
    [name] = custom_calls(compiled)
    assert "route" in name


@pytest.mark.slow
def test_reads_tokens_once() -> None:
    """Bytes to and from HBM: tokens, weights and results, with some padding; unfused programs move several times that."""
    n, d = 32768, 1024
    shapes = [jax.ShapeDtypeStruct(s, t) for s, t in (((n, d), jnp.bfloat16), ((d, E), jnp.float32), ((E,), jnp.float32))]

    def moved(implementation: str) -> float:
        compiled = compile_for("v5e", lambda *a: route(*a[:2], K, "sigmoid", a[2], True, None, implementation), *shapes)
        return compiled.cost_analysis()["bytes accessed"]

    least = 2 * n * d + 4 * d * E + 4 * n * (E + 2 * K + 1)
    assert least < moved("tpu") < 1.5 * least
    assert moved("tpu") < 0.5 * moved("xla")


@pytest.mark.parametrize(("n", "d", "e"), [(1000, 1000, 60), (5, 200, 3)])
def test_compiles_odd_sizes(n: int, d: int, e: int) -> None:
    shapes = jax.ShapeDtypeStruct((n, d), jnp.float32), jax.ShapeDtypeStruct((d, e), jnp.float32)
    compiled = compile_for("v6e", lambda x, w: route(x, w, 3, implementation="tpu"), *shapes)
    assert custom_calls(compiled) == ["route"]
