"""Permute's kernels through the TPU compiler, and down to Triton IR for GPUs."""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from kernels.gpu import lower_for, triton_kernels
from kernels.tpu import KINDS, compile_for, custom_calls

from pallas_kernels import permute, unpermute


def step(implementation: str, k: int) -> Callable[..., tuple]:
    """Values and gradients of both, as one program."""

    def run(x: jax.Array, weight: jax.Array, order: jax.Array, inverse: jax.Array) -> tuple:
        rows, back = jax.vjp(lambda x: permute(x, order, inverse, k, implementation), x)
        y, back_y = jax.vjp(lambda r, w: unpermute(r, w, order, inverse, implementation), rows, weight)
        drows, dweight = back_y(y)
        return y, dweight, back(drows)

    return run


def shapes(n: int, k: int, d: int, dtype: jnp.dtype) -> list[jax.ShapeDtypeStruct]:
    index = jax.ShapeDtypeStruct((n * k,), jnp.int32)
    return [jax.ShapeDtypeStruct((n, d), dtype), jax.ShapeDtypeStruct((n, k), jnp.float32), index, index]


def kernels(compiled: jax.stages.Compiled) -> list[str]:
    """Names of the kernels, without the derivative that a call is part of."""
    return sorted(re.search("gather_sum|gather_scale_dot", call)[0] for call in custom_calls(compiled))


@pytest.mark.tpu_aot
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_tpu_compiler_takes_the_kernels(kind: str, dtype: jnp.dtype) -> None:
    n, k, d = 2048, 4, 2048
    compiled = compile_for(kind, step("tpu", k), *shapes(n, k, d, dtype))
    assert kernels(compiled) == ["gather_scale_dot"] + 3 * ["gather_sum"]
    # Nothing of the size of the rows beside the rows themselves: no [n, k, d] laid out anew.
    rows = n * k * d * jnp.dtype(dtype).itemsize
    assert compiled.memory_analysis().temp_size_in_bytes < 2.5 * rows


@pytest.mark.tpu_aot
@pytest.mark.slow
def test_tpu_kernels_of_odd_sizes_compile() -> None:
    compiled = compile_for("v5e", step("tpu", 3), *shapes(50, 3, 200, jnp.bfloat16))
    assert "gather_sum" in kernels(compiled)


@pytest.mark.tpu_aot
@pytest.mark.slow
def test_auto_on_tpu_moves_rows_out_with_xla_and_sums_them_with_the_kernel() -> None:
    compiled = compile_for("v5e", step("auto", 4), *shapes(2048, 4, 2048, jnp.bfloat16))
    assert kernels(compiled) == ["gather_scale_dot", "gather_sum", "gather_sum"]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_gpu_kernels_lower_to_triton(dtype: jnp.dtype) -> None:
    calls = triton_kernels(lower_for("h100", step("gpu", 3), *shapes(50, 3, 200, dtype)))
    assert {kernel.name for kernel in calls} == {"gather_sum", "gather_scale_dot"}
    for kernel in calls:
        assert kernel.widenings == ({"bf16"} if dtype == jnp.bfloat16 else set())
