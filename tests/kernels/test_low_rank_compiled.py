"""The low-rank kernels through the TPU compiler, and down to Triton IR for GPUs."""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from kernels.gpu import lower_for, triton_kernels
from kernels.tpu import KINDS, compile_for, custom_calls

from pallas_kernels.implementations import target
from pallas_kernels.low_rank import low_rank_grouped_matmul, tpu


def step(implementation: str) -> Callable[..., tuple]:
    """Value and gradients, as one program."""

    def run(x: jax.Array, a: jax.Array, b: jax.Array, sizes: jax.Array) -> tuple:
        y, back = jax.vjp(lambda x, a, b: low_rank_grouped_matmul(x, a, b, sizes, 2.0, implementation), x, a, b)
        return y, *back(y)

    return run


def shapes(m: int, d: int, r: int, f: int, e: int, dtype: jnp.dtype) -> list[jax.ShapeDtypeStruct]:
    matrices = [jax.ShapeDtypeStruct(shape, dtype) for shape in ((m, d), (e, d, r), (e, r, f))]
    return [*matrices, jax.ShapeDtypeStruct((e,), jnp.int32)]


@pytest.mark.tpu_aot
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_tpu_compiler_takes_the_kernels(kind: str, dtype: jnp.dtype) -> None:
    compiled = compile_for(kind, step("auto"), *shapes(4096, 2048, 16, 2048, 32, dtype))
    names = sorted(re.search("low_rank(_gradients)?", call)[0] for call in custom_calls(compiled))
    assert names == ["low_rank", "low_rank_gradients"]


@pytest.mark.tpu_aot
@pytest.mark.parametrize(("m", "d", "r", "f", "e"), [(100, 200, 3, 130, 5), (64, 256, 160, 128, 2)])
def test_tpu_kernels_of_odd_sizes_compile(m: int, d: int, r: int, f: int, e: int) -> None:
    assert len(custom_calls(compile_for("v5e", step("tpu"), *shapes(m, d, r, f, e, jnp.bfloat16)))) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_fit_into_vmem(kind: str) -> None:
    with target(kind):
        for d, f in ((2048, 2048), (4096, 14336), (8192, 28672)):
            rows = tpu.tile_rows(1 << 16, 128, d, f, 2, backward=True)
            assert rows is None or rows >= 16
            assert rows is not None or d == 8192


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_gpu_kernels_lower_to_triton(dtype: jnp.dtype) -> None:
    kernels = triton_kernels(lower_for("h100", step("auto"), *shapes(100, 200, 3, 130, 5, dtype)))
    assert {"low_rank", "low_rank_transposed"} <= {kernel.name for kernel in kernels}
    name = "f32" if dtype == jnp.float32 else "bf16"
    assert all(kernel.dots == {(name, name, "f32")} for kernel in kernels)
