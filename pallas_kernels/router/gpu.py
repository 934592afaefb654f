"""The router as one Triton kernel: a program owns a tile of tokens, loops over d with the logits in registers, then selects.

Counts and importance leave as one row per program and are summed outside: no atomics, so the same input gives the same bits.
Triton wants powers of two: experts are padded to one inside the kernel, never in memory. Places in memory are given by arrays of
indices, since jax 0.12 refuses slices that reach beyond an array, masked or not.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from pallas_kernels.router.selection import Routed, Rule, choose, columns_of, float32_parts

MAX_EXPERTS, MAX_K = 512, 64  # 1024 compile, and spill


def refuses(k: int, e: int) -> str | None:
    """Why the kernel cannot run, or None."""
    if e > MAX_EXPERTS:
        return f"{e} experts; the logits of a tile of tokens must fit in registers, which they do up to {MAX_EXPERTS}"
    return f"k={k}; its rounds are unrolled, up to {MAX_K}" if k > MAX_K else None


def choose_tiles(e: int) -> tuple[int, int, int]:
    """Tokens and width of a tile, and warps: about 32 logits per thread, and w's tile within shared memory."""
    e = max(pl.next_power_of_2(e), 16)
    rows = min(64, max(16, 8192 // e))
    return rows, (64 if e <= 256 else 32), (4 if rows * e <= 4096 else 8)


def route(
    x: Array,
    w: Array,
    bias: Array | None,
    valid: Array,
    rule: Rule,
    interpret: bool = False,
    tiles: tuple[int, int, int] | None = None,
) -> Routed:
    """See the package. `tiles`: tokens and width of a tile, powers of two of at least 16, and the number of warps."""
    (n, d), e, k = x.shape, w.shape[1], rule.k
    parts = float32_parts(x, w)
    x = x.astype(parts.dtype)
    rows, width, warps = tiles or choose_tiles(e)
    steps = pl.cdiv(n, rows)
    biases = [] if bias is None else [bias]
    expert, weight, logits, counts, importance, z = pl.pallas_call(
        partial(_kernel, rule=rule, rows=rows, width=width),
        grid=(steps,),
        out_shape=[
            jax.ShapeDtypeStruct((n, k), jnp.int32),
            jax.ShapeDtypeStruct((n, k), jnp.float32),
            jax.ShapeDtypeStruct((n, e), jnp.float32),
            jax.ShapeDtypeStruct((steps, e), jnp.int32),
            jax.ShapeDtypeStruct((steps, e), jnp.float32),
            jax.ShapeDtypeStruct((n,), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=2),
        cost_estimate=pl.CostEstimate(
            flops=2 * n * d * e * parts.shape[0],
            transcendentals=n * e,
            bytes_accessed=x.nbytes + parts.nbytes + 4 * n * (e + 2 * k + 2),
        ),
        interpret=interpret,
        name="route",
    )(x, parts.reshape(-1, e), valid.astype(jnp.int32), *biases)
    return Routed(expert, weight, logits, counts.sum(0), importance.sum(0), z)


def _kernel(x_ref: Any, w_ref: Any, valid_ref: Any, *refs: Any, rule: Rule, rows: int, width: int) -> None:
    """Refs, whole arrays: [bias], expert, weight, logits, counts and importance of each program, z."""
    *bias_ref, expert_ref, weight_ref, logits_ref, counts_ref, importance_ref, z_ref = refs
    (n, d), e = x_ref.shape, w_ref.shape[1]
    tile = pl.program_id(0)
    padded, choices = max(pl.next_power_of_2(e), 16), pl.next_power_of_2(rule.k)
    token, expert = tile * rows + jnp.arange(rows), jnp.arange(padded)
    inside, real = token < n, expert < e
    precision = jax.lax.Precision.HIGHEST if x_ref.dtype == jnp.float32 else None

    def step(j: Array, logits: Array) -> Array:
        column = j * width + jnp.arange(width)
        there = column < d
        x = plgpu.load(x_ref.at[token[:, None], column[None]], mask=inside[:, None] & there, other=0)
        for part in range(0, w_ref.shape[0], d):
            w = plgpu.load(w_ref.at[part + column[:, None], expert[None]], mask=there[:, None] & real, other=0)
            logits += jnp.dot(x, w, precision=precision, preferred_element_type=jnp.float32)
        return logits

    logits = jax.lax.fori_loop(0, pl.cdiv(d, width), step, jnp.zeros((rows, padded), jnp.float32))
    plgpu.store(logits_ref.at[token[:, None], expert[None]], logits, mask=inside[:, None] & real)
    bias = plgpu.load(bias_ref[0].at[expert], mask=real, other=0)[None] if bias_ref else None
    choice = choose(logits, bias, rule, 1, num_experts=e)
    place = jnp.arange(choices)
    for ref, parts in ((expert_ref, [jnp.minimum(pick, e - 1) for pick in choice.expert]), (weight_ref, choice.weight)):
        columns = columns_of(parts, choices)
        plgpu.store(ref.at[token[:, None], place[None]], columns, mask=inside[:, None] & (place < rule.k))
    plgpu.store(z_ref.at[token], choice.z[:, 0], mask=inside)
    counted = plgpu.load(valid_ref.at[token], mask=inside, other=0)[:, None] != 0
    counts = jnp.sum(jnp.where(choice.chosen & counted, 1, 0), axis=0)
    plgpu.store(counts_ref.at[jnp.full_like(expert, tile), expert], counts, mask=real)
    importance = jnp.sum(jnp.where(counted, choice.scores, 0.0), axis=0)
    plgpu.store(importance_ref.at[jnp.full_like(expert, tile), expert], importance, mask=real)
