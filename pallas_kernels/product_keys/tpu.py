"""Product-key top-k as one TPU kernel: a grid step holds a head's half keys and a tile of tokens.

Half scores are computed transposed, keys on sublanes and tokens on lanes, so that a maximum over keys is elementwise but for the last
8 rows. They live and die in VMEM: HBM sees queries and keys in, and k scores and indices out.

VMEM with r tokens of a tile, D = dk rounded up to 64 and b bytes: keys 4 s D b, queries 4 r D b, scores 4 s r, and about four
temporaries of that size.
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
from pallas_kernels.product_keys.xla import staircase
from pallas_kernels.top_k import LOWEST

MAX_K = 256
# (chip, s, dk, k) -> tokens of a tile that measurements on that chip favour over the rule's.
# Empty: the kernel has been compiled for every chip here, but not yet timed on one.
TILES: dict[tuple[str, int, int, int], int] = {}


def refuses(k: int, s: int, dk: int) -> str | None:
    """Why the kernel cannot run, or None."""
    if k > MAX_K:
        return f"k={k}; candidates are laid out by unrolled code, up to {MAX_K}"
    fits = _bytes(128, s, dk) <= _vmem() // 2
    return None if fits else f"{s} half keys of width {dk}; those of a head must fit in VMEM together with 128 tokens' scores"


def choose_rows(n: int, s: int, dk: int, k: int) -> int:
    """Tokens of a tile: the table's, or as many as fit, up to 512."""
    rows = TILES.get((current_chip().kind, s, dk, k)) or next(
        rows for rows in (512, 256, 128) if rows == 128 or _bytes(rows, s, dk) <= _vmem() // 4
    )
    return min(rows, n)


def _bytes(rows: int, s: int, dk: int) -> int:
    return 16 * (s + rows) * pl.cdiv(dk, 64) * 64 + 20 * s * rows


def _vmem() -> int:
    """Bytes of VMEM; v5e's where the chip is no TPU (the interpreter) or an unknown one."""
    return TPUS.get(current_chip().kind, TPUS["v5e"]).vmem


def top_k(query: Array, keys: Array, k: int, interpret: bool = False, rows: int | None = None) -> tuple[Array, Array]:
    """See the package. `rows`: tokens of a tile, a multiple of 128, or n."""
    (n, h, _, dk), s = query.shape, keys.shape[2]
    rows = rows or choose_rows(n, s, dk, k)
    dtype = jnp.promote_types(query.dtype, keys.dtype)
    # A head's queries are a block of whole lanes, so that no transposition is needed; zeros change no product.
    query, keys = (jnp.pad(a.astype(dtype), ((0, 0), (0, 0), (0, 0), (0, -dk % 64))) for a in (query, keys))
    width, best, candidates = query.shape[3], min(k, s), len(staircase(k, s))
    score, index = pl.pallas_call(
        partial(_kernel, k=k),
        grid=(h, pl.cdiv(n, rows)),
        in_specs=[
            pl.BlockSpec((rows, 2 * width), lambda head, i: (i, head)),
            pl.BlockSpec((1, 2, s, width), lambda head, i: (head, 0, 0, 0)),
        ],
        out_specs=[pl.BlockSpec((1, k, rows), lambda head, i: (head, 0, i))] * 2,
        out_shape=[jax.ShapeDtypeStruct((h, k, n), jnp.float32), jax.ShapeDtypeStruct((h, k, n), jnp.int32)],
        scratch_shapes=[
            pltpu.VMEM((s, rows), jnp.float32),
            pltpu.VMEM((2, best, rows), jnp.float32),
            pltpu.VMEM((2, best, rows), jnp.int32),
            pltpu.VMEM((candidates, rows), jnp.float32),
            pltpu.VMEM((candidates, rows), jnp.int32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=_vmem() * 3 // 4),
        cost_estimate=pl.CostEstimate(
            flops=4 * n * h * s * width, transcendentals=0, bytes_accessed=query.nbytes + keys.nbytes + 8 * n * h * k
        ),
        interpret=pltpu.InterpretParams(detect_races=True) if interpret else False,
        name="product_key_top_k",
    )(query.reshape(n, h * 2 * width), keys)
    return score.transpose(2, 0, 1), index.transpose(2, 0, 1)


def _kernel(query_ref: Any, keys_ref: Any, score_ref: Any, index_ref: Any, *scratch: Any, k: int) -> None:
    """Scratch: a half's scores; the best of both halves and their indices; the candidate sums and theirs."""
    half, best, best_index, sums, sums_index = scratch
    (_, _, s, width), rows = keys_ref.shape, query_ref.shape[0]
    precision = jax.lax.Precision.HIGHEST if query_ref.dtype == jnp.float32 else None
    for w in range(2):
        products = jax.lax.dot_general(
            keys_ref[0, w],
            query_ref[:, w * width : (w + 1) * width],
            (((1,), (1,)), ((), ())),
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        half[...] = jnp.maximum(products, LOWEST)
        _rounds(half, lambda: jax.lax.broadcasted_iota(jnp.int32, (s, rows), 0), best.at[w], best_index.at[w], s - 1)
    start = 0
    for a in range(best.shape[1]):
        length = min(k // (a + 1), s)
        here = slice(start, start + length)
        sums[here, :] = jnp.maximum(best[0, a : a + 1, :] + best[1, :length, :], LOWEST)
        sums_index[here, :] = best_index[0, a : a + 1, :] * s + best_index[1, :length, :]
        start += length
    _rounds(sums, lambda: sums_index[...], score_ref.at[0], index_ref.at[0], s * s - 1)


def _rounds(rank_ref: Any, index: Callable[[], Array], score_ref: Any, index_ref: Any, highest: int) -> None:
    """`top_k_by_rounds` along the first axis, as a loop over rows of the results; uses up `rank_ref`."""

    def step(r: Array, _: None) -> None:
        rank, at = rank_ref[...], index()
        top = jnp.max(rank, axis=0, keepdims=True)
        pick = jnp.min(jnp.where(rank == top, at, highest), axis=0, keepdims=True)
        score_ref[pl.ds(r, 1), :] = top
        index_ref[pl.ds(r, 1), :] = pick
        rank_ref[...] = jnp.where(at == pick, -jnp.inf, rank)

    jax.lax.fori_loop(0, score_ref.shape[0], step, None)
