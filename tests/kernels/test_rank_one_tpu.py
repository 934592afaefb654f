"""Rank-one experts through the real TPU compiler."""

import jax
import jax.numpy as jnp
import pytest
from kernels.tpu import KINDS, compile_for, custom_calls

from pallas_kernels.rank_one import rank_one_experts

pytestmark = pytest.mark.tpu_aot


def shapes(n: int, p: int, d: int, e: int, dtype: jnp.dtype = jnp.float32) -> tuple[jax.ShapeDtypeStruct, ...]:
    described = ((n, d), dtype), ((n, p), jnp.int32), ((n, p), jnp.float32), ((e, d), dtype), ((e, d), dtype)
    return tuple(jax.ShapeDtypeStruct(*one) for one in described)


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_forward_and_backward(kind: str) -> None:
    def loss(*args: jax.Array) -> jax.Array:
        return rank_one_experts(*args, jax.nn.gelu).sum()

    compiled = compile_for(kind, jax.value_and_grad(loss, (0, 3, 4)), *shapes(1024, 16, 256, 65536))
    [name] = custom_calls(compiled)
    assert "rank_one_experts" in name


def test_moves_each_picked_row_once() -> None:
    n, p, d, e = 1024, 16, 256, 65536
    compiled = compile_for("v5e", lambda *a: rank_one_experts(*a, jax.nn.gelu, "tpu"), *shapes(n, p, d, e))
    rows = 2 * 4 * n * p * d
    assert rows < compiled.cost_analysis()["bytes accessed"] < 1.3 * rows


def test_bfloat16_banks_fall_back_to_xla_and_odd_sizes_compile() -> None:
    args = shapes(20, 5, 200, 77, jnp.bfloat16)
    assert custom_calls(compile_for("v6e", lambda *a: rank_one_experts(*a, jax.nn.gelu), *args)) == []
    compiled = compile_for("v6e", lambda *a: rank_one_experts(*a, jax.nn.gelu, "tpu"), *shapes(20, 5, 200, 77))
    assert custom_calls(compiled) == ["rank_one_experts"]
