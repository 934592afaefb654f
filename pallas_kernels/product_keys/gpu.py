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

from pallas_kernels.router.selection import LOWEST, top_k_by_rounds

MAX_HALF_KEYS, MAX_K, MAX_WIDTH = 1024, 32, 256
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
    head, tokens = pl.program_id(1), pl.ds(pl.program_id(0) * rows, rows)
    inside = pl.program_id(0) * rows + jnp.arange(rows) < n
    columns, real = jnp.arange(width) < dk, jnp.arange(padded) < s
    precision = jax.lax.Precision.HIGHEST if query_ref.dtype == jnp.float32 else None
    at = jax.lax.broadcasted_iota(jnp.int32, (rows, padded), 1)
    rank = jax.lax.broadcasted_iota(jnp.int32, (rows, ranks), 1)
    halves = []
    for w in range(2):
        half = 2 * head + w
        query = plgpu.load(query_ref.at[tokens, pl.ds(half * dk, width)], mask=inside[:, None] & columns, other=0)
        keys = plgpu.load(keys_ref.at[pl.ds(half * s, padded), pl.ds(0, width)], mask=real[:, None] & columns, other=0)
        scores = jnp.dot(query, keys.T, precision=precision, preferred_element_type=jnp.float32)
        scores = jnp.where(real[None], jnp.maximum(scores, LOWEST), -jnp.inf)
        found = top_k_by_rounds(scores, min(k, s), 1, at)
        halves.append([_tile(parts, rank, empty) for parts, empty in zip(found, (-jnp.inf, s), strict=True)])
    (first, i), (second, j) = halves
    possible = (jnp.arange(ranks)[:, None] + 1) * (jnp.arange(ranks)[None] + 1) <= k
    sums = first[:, :, None] + second[:, None, :]
    # Beyond the half keys there are, ranks hold -inf, which no sum of real scores may sink to.
    sums = jnp.where(possible[None] & (sums > -jnp.inf), jnp.maximum(sums, LOWEST), -jnp.inf)
    index = i[:, :, None] * s + j[:, None, :]
    best, picks = top_k_by_rounds(sums.reshape(rows, ranks * ranks), k, 1, index.reshape(rows, ranks * ranks))
    for r in range(k):
        place = tokens, pl.ds(head * k + r, 1)
        plgpu.store(score_ref.at[place], best[r], mask=inside[:, None])
        plgpu.store(index_ref.at[place], jnp.minimum(picks[r], s * s - 1), mask=inside[:, None])


def _tile(parts: list[Array], rank: Array, empty: float | int) -> Array:
    """parts[r] of shape [rows, 1] as column r of one tile; `empty` where there is none."""
    tile = jnp.full(rank.shape, empty, parts[0].dtype)
    for r, part in enumerate(parts):
        tile = jnp.where(rank == r, part, tile)
    return tile
