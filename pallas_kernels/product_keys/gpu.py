"""Product-key top-k as one Triton kernel: a program owns a tile of tokens and a head, with a half's scores in registers.

Triton wants powers of two and no indexing into registers: half keys are padded inside the kernel, and the best of a half are gathered
into a tile by selects.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from pallas_kernels.top_k import LOWEST, columns_of, top_k_by_rounds

MAX_HALF_KEYS, MAX_K, MAX_WIDTH = 512, 16, 256  # twice of either compiles for minutes, and spills
ROWS = 16  # the least that Triton multiplies


def refuses(k: int, s: int, dk: int) -> str | None:
    """Why the kernel cannot run, or None."""
    if s > MAX_HALF_KEYS:
        return f"{s} half keys; a half's scores must fit in registers, which they do up to {MAX_HALF_KEYS}"
    if dk > MAX_WIDTH:
        return f"half keys of width {dk}; they are multiplied whole, up to {MAX_WIDTH}"
    return f"k={k}; its rounds are unrolled, up to {MAX_K}" if k > MAX_K else None


def top_k(query: Array, keys: Array, k: int, interpret: bool = False, rows: int = ROWS) -> tuple[Array, Array]:
    """See the package. `rows`: tokens of a tile, a power of two of at least 16."""
    (n, h, _, dk), s = query.shape, keys.shape[2]
    dtype = jnp.promote_types(query.dtype, keys.dtype)
    query, keys = query.astype(dtype).reshape(n, h * 2 * dk), keys.astype(dtype).reshape(h * 2 * s, dk)
    score, index = pl.pallas_call(
        partial(_kernel, k=k, s=s, rows=rows),
        grid=(pl.cdiv(n, rows), h),
        out_shape=[jax.ShapeDtypeStruct((n, h * k), jnp.float32), jax.ShapeDtypeStruct((n, h * k), jnp.int32)],
        compiler_params=plgpu.CompilerParams(num_warps=4 if s * rows <= 4096 else 8, num_stages=1),
        cost_estimate=pl.CostEstimate(
            flops=4 * n * h * s * dk, transcendentals=0, bytes_accessed=query.nbytes + keys.nbytes + 8 * n * h * k
        ),
        interpret=interpret,
        name="product_key_top_k",
    )(query, keys)
    return score.reshape(n, h, k), index.reshape(n, h, k)


def _kernel(query_ref: Any, keys_ref: Any, score_ref: Any, index_ref: Any, *, k: int, s: int, rows: int) -> None:
    n, dk = query_ref.shape[0], keys_ref.shape[1]
    padded, width, ranks = (pl.next_power_of_2(size) for size in (max(s, 16), max(dk, 16), k))
    head, token = pl.program_id(1), pl.program_id(0) * rows + jnp.arange(rows)
    column, own = jnp.arange(width), jnp.arange(padded)
    inside, there, real = token < n, column < dk, own < s
    precision = jax.lax.Precision.HIGHEST if query_ref.dtype == jnp.float32 else None
    at = jax.lax.broadcasted_iota(jnp.int32, (rows, padded), 1)
    halves = []
    for w in range(2):
        half = 2 * head + w
        place = token[:, None], half * dk + column[None]
        query = plgpu.load(query_ref.at[place], mask=inside[:, None] & there, other=0)
        keys = plgpu.load(keys_ref.at[half * s + own[:, None], column[None]], mask=real[:, None] & there, other=0)
        scores = jnp.dot(query, keys.T, precision=precision, preferred_element_type=jnp.float32)
        scores = jnp.where(real[None], jnp.maximum(scores, LOWEST), -jnp.inf)
        halves.append([columns_of(parts, ranks) for parts in top_k_by_rounds(scores, min(k, s), 1, at)])
    (first, i), (second, j) = halves
    rank = jnp.arange(ranks)
    found = rank < min(k, s)
    possible = ((rank[:, None] + 1) * (rank[None] + 1) <= k) & found[:, None] & found[None]
    sums = jnp.maximum(first[:, :, None] + second[:, None, :], LOWEST)
    sums = jnp.where(possible[None], sums, -jnp.inf).reshape(rows, ranks * ranks)
    index = (i[:, :, None] * s + j[:, None, :]).reshape(rows, ranks * ranks)
    best, picks = top_k_by_rounds(sums, k, 1, index)
    place, wanted = (token[:, None], head * k + rank[None]), inside[:, None] & (rank < k)
    plgpu.store(score_ref.at[place], columns_of(best, ranks), mask=wanted)
    plgpu.store(index_ref.at[place], jnp.minimum(columns_of(picks, ranks), s * s - 1), mask=wanted)
