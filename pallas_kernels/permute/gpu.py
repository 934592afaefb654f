"""Sums of gathered rows on NVIDIA GPUs (Triton): a program holds the k rows of a few tokens in registers.

`gather_sum` splits tokens and columns over programs: each row is read once and each sum written once. `gather_scale_dot` gives a
program a few rows whole, and walks over their columns. A block has about `_ELEMENTS` elements, 32 registers a thread; axes that
are not powers of two are masked.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

_ELEMENTS = 4096
_COLUMNS = 512  # of a block: a kilobyte of a bfloat16 row at a time
_PARAMS = plgpu.CompilerParams(num_warps=4, num_stages=1)


def refuses(num_rows: int, d: int, dtype: jnp.dtype, k: int) -> str | None:
    """Why k at a time of these rows cannot be gathered, or None."""
    return None if dtype in (jnp.float32, jnp.bfloat16, jnp.float16) else f"rows are {dtype}, not of up to 32 bits"


def gather_sum(
    source: Float[Array, "s d"],
    index: Int[Array, "n k"],
    weight: Float[Array, "n k"] | None,
    interpret: bool = False,
) -> Float[Array, "n d"]:
    """See the package."""
    (n, k), d = index.shape, source.shape[1]
    choices, columns = pl.next_power_of_2(k), min(pl.next_power_of_2(d), _COLUMNS)
    tokens = max(1, _ELEMENTS // (choices * columns))
    weight = jnp.ones((n, k), jnp.float32) if weight is None else weight
    return pl.pallas_call(
        partial(_sum_kernel, n, k, d, (tokens, choices, columns)),
        grid=(pl.cdiv(n, tokens), pl.cdiv(d, columns)),
        in_specs=[pl.no_block_spec] * 3,
        out_specs=pl.no_block_spec,
        out_shape=jax.ShapeDtypeStruct((n, d), source.dtype),
        compiler_params=_PARAMS,
        cost_estimate=pl.CostEstimate(
            flops=2 * n * k * d, transcendentals=0, bytes_accessed=(n * k + n) * d * source.dtype.itemsize
        ),
        interpret=interpret,
        name="gather_sum",
    )(source, index, weight)


def gather_scale_dot(
    source: Float[Array, "s d"],
    index: Int[Array, "m"],
    rows: Float[Array, "m d"],
    weight: Float[Array, "m"],
    interpret: bool = False,
) -> tuple[Float[Array, "m d"], Float[Array, "m"]]:
    """See the package."""
    m, d = rows.shape
    columns = min(pl.next_power_of_2(d), _COLUMNS)
    block = max(1, _ELEMENTS // columns)
    return tuple(
        pl.pallas_call(
            partial(_scale_dot_kernel, m, d, (block, columns)),
            grid=(pl.cdiv(m, block),),
            in_specs=[pl.no_block_spec] * 4,
            out_specs=[pl.no_block_spec] * 2,
            out_shape=[jax.ShapeDtypeStruct((m, d), source.dtype), jax.ShapeDtypeStruct((m,), jnp.float32)],
            compiler_params=_PARAMS,
            cost_estimate=pl.CostEstimate(flops=3 * m * d, transcendentals=0, bytes_accessed=3 * m * d * source.dtype.itemsize),
            interpret=interpret,
            name="gather_scale_dot",
        )(source, index, rows, weight)
    )


def _sum_kernel(n: int, k: int, d: int, block: tuple[int, int, int], source: Any, index: Any, weight: Any, y: Any) -> None:
    tokens, choices, columns = block
    token = pl.program_id(0) * tokens + jnp.arange(tokens)
    column = pl.program_id(1) * columns + jnp.arange(columns)
    choice = jnp.arange(choices)
    there = (token < n)[:, None] & (choice < k)[None]
    at = token[:, None], choice[None]
    row = plgpu.load(index.at[at], mask=there, other=0)
    w = plgpu.load(weight.at[at], mask=there, other=0).astype(jnp.float32)[:, :, None]
    # An entry of weight zero is not even read: what its row holds does not matter.
    wanted = (w != 0) & (column < d)[None, None]
    rows = plgpu.load(source.at[row[:, :, None], column[None, None]], mask=wanted, other=0)
    total = jnp.sum(w * rows.astype(jnp.float32), axis=1)
    inside = (token < n)[:, None] & (column < d)[None]
    plgpu.store(y.at[token[:, None], column[None]], total.astype(y.dtype), mask=inside)


def _scale_dot_kernel(
    m: int, d: int, block: tuple[int, int], source: Any, index: Any, rows: Any, weight: Any, scaled: Any, dots: Any
) -> None:
    size, columns = block
    r = pl.program_id(0) * size + jnp.arange(size)
    row = plgpu.load(index.at[r], mask=r < m, other=0)
    w = plgpu.load(weight.at[r], mask=r < m, other=0).astype(jnp.float32)

    def step(c: Array, dot: Array) -> Array:
        column = (c * columns + jnp.arange(columns))[None]
        inside = (r < m)[:, None] & (column < d)
        gathered = plgpu.load(source.at[row[:, None], column], mask=inside, other=0).astype(jnp.float32)
        own = plgpu.load(rows.at[r[:, None], column], mask=inside, other=0).astype(jnp.float32)
        plgpu.store(scaled.at[r[:, None], column], (w[:, None] * gathered).astype(scaled.dtype), mask=inside)
        return dot + jnp.sum(gathered * own, axis=1)

    dot = jax.lax.fori_loop(0, pl.cdiv(d, columns), step, jnp.zeros(size, jnp.float32))
    plgpu.store(dots.at[r], dot, mask=r < m)
