"""Rank-one experts on TPU, forward: picked rows travel from HBM to VMEM one by one and are used there.

A grid step holds 8 tokens. While it computes, the rows of the next step are on their way: indices are prefetched into scalar memory, and
each names a copy of one row. Of pick j, the 8 tokens' rows lie in 8 sublanes, so that a product with the tokens is elementwise.

VMEM: two steps' rows of both banks, 4 * 8 p d * 4 bytes (512 KiB for p=16, d=256). HBM: 8 n p d bytes of rows, each once, besides
tokens and results; gathering first and multiplying afterwards moves three times that.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.chips import TPUS
from pallas_kernels.implementations import current_chip
from pallas_kernels.rank_one.chunks import over_chunks

TOKENS = 8
MAX_PICKS_PER_CALL = 1 << 16  # their indices take a quarter of a MiB of scalar memory
MAX_PICKS = 256


def refuses(index: Array, u: Array, v: Array) -> str | None:
    """Why the kernel cannot run, or None."""
    (_, p), d = index.shape, u.shape[1]
    if u.dtype != jnp.float32 or v.dtype != jnp.float32:
        return f"banks of {u.dtype} and {v.dtype}; rows narrower than 32 bits cannot be copied one by one"
    if p > MAX_PICKS:
        return f"{p} picks per token; they are unrolled, up to {MAX_PICKS}"
    return f"{p} rows of width {d} per token do not fit in VMEM" if _buffers(p, d) > _vmem() // 2 else None


def _buffers(p: int, d: int) -> int:
    return 16 * TOKENS * p * pl.cdiv(d, 128) * 128


def _vmem() -> int:
    """Bytes of VMEM; v5e's where the chip is no TPU (the interpreter) or an unknown one."""
    return TPUS.get(current_chip().kind, TPUS["v5e"]).vmem


def experts(
    x: Array, index: Array, weight: Array, u: Array, v: Array, activation: Callable[[Array], Array], interpret: bool = False
) -> Array:
    """See the package; float32."""

    def step(carry: None, chunk: tuple[Array, ...]) -> tuple[None, tuple[Array]]:
        return carry, (_call(*chunk, u, v, activation, interpret),)

    tokens = MAX_PICKS_PER_CALL // index.shape[1] // TOKENS * TOKENS
    _, (y,) = over_chunks(step, None, (x.astype(jnp.float32), index, weight.astype(jnp.float32)), tokens)
    return y


def _call(
    x: Array, index: Array, weight: Array, u: Array, v: Array, activation: Callable[[Array], Array], interpret: bool
) -> Array:
    (n, d), p = x.shape, index.shape[1]
    steps = pl.cdiv(n, TOKENS)
    index = jnp.pad(index, ((0, steps * TOKENS - n), (0, 0)))  # row 0 for tokens past the end
    by_pick = index.reshape(steps, TOKENS, p).swapaxes(1, 2).reshape(-1).astype(jnp.int32)

    def tile(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((TOKENS, width), lambda i, _: (i, 0))

    return pl.pallas_call(
        partial(_kernel, activation=activation),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(steps,),
            in_specs=[tile(d), tile(p), pl.BlockSpec(memory_space=pl.ANY), pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=tile(d),
            scratch_shapes=[
                pltpu.VMEM((2, p * TOKENS, d), jnp.float32),
                pltpu.VMEM((2, p * TOKENS, d), jnp.float32),
                pltpu.SemaphoreType.DMA((2, 2)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((n, d), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=_vmem() * 3 // 4),
        cost_estimate=pl.CostEstimate(
            flops=4 * n * p * d, transcendentals=n * p, bytes_accessed=8 * n * p * d + 8 * n * d + 8 * n * p
        ),
        interpret=pltpu.InterpretParams(detect_races=True) if interpret else False,
        name="rank_one_experts",
    )(by_pick, x, weight, u, v)


def _kernel(
    index_ref: Any,
    x_ref: Any,
    weight_ref: Any,
    u_ref: Any,
    v_ref: Any,
    y_ref: Any,
    *scratch: Any,
    activation: Callable[[Array], Array],
) -> None:
    """Scratch: this and the next step's rows of u, the same of v, and the semaphores of their arrival."""
    u_rows, v_rows, arrived = scratch
    i, (_, picks, _), p = pl.program_id(0), u_rows.shape, weight_ref.shape[1]
    banks = ((u_ref, u_rows), (v_ref, v_rows))

    def fetch(step: Array) -> None:
        side = jax.lax.rem(step, 2)

        def row(r: Array, _: None) -> None:
            source = pl.ds(index_ref[step * picks + r], 1)
            for b, (bank, rows) in enumerate(banks):
                pltpu.make_async_copy(bank.at[source], rows.at[side, pl.ds(r, 1)], arrived.at[side, b]).start()

        jax.lax.fori_loop(0, picks, row, None)

    @pl.when(i == 0)
    def _() -> None:
        fetch(i)

    @pl.when(i + 1 < pl.num_programs(0))
    def _() -> None:
        fetch(i + 1)

    side = jax.lax.rem(i, 2)
    for b, (_, rows) in enumerate(banks):  # waits for as many bytes as all rows of the step have
        pltpu.make_async_copy(rows.at[side], rows.at[side], arrived.at[side, b]).wait()
    x = x_ref[...]
    here = [slice(j * TOKENS, (j + 1) * TOKENS) for j in range(p)]
    column = jax.lax.broadcasted_iota(jnp.int32, (TOKENS, p), 1)
    pre = jnp.zeros((TOKENS, p), jnp.float32)
    for j in range(p):
        pre = jnp.where(column == j, jnp.sum(x * u_rows[side, here[j], :], axis=1, keepdims=True), pre)
    scale = weight_ref[...] * activation(pre)
    y = jnp.zeros_like(x)
    for j in range(p):
        y += scale[:, j : j + 1] * v_rows[side, here[j], :]
    y_ref[...] = y
