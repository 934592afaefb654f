"""The router as one TPU kernel: matmul over tiles of d into a float32 accumulator, then selection while it is in VMEM.

Selection works on the transposed tile, experts on sublanes and tokens on lanes: a maximum over experts is then elementwise but
for the last 8 rows, fewer than 128 experts waste no lanes, and expert and weight leave as full rows `[k, n]`.

VMEM of a tile of r tokens and t of d, with E = e rounded up to 128 and p parts of w (see `float32_parts`):
    x 2 r t bytes(x)  +  w 2 p t E bytes(w)  +  logits and accumulator 12 r E  +  selection about 32 r E
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.chips import TPUS
from pallas_kernels.implementations import current_chip
from pallas_kernels.router.selection import Routed, Rule, choose, float32_parts

MAX_EXPERTS, MAX_K = 2048, 64
# The most of d that one product takes: bounds what the compiler keeps of a float32 product's bfloat16 parts.
STEP = 1024
# (chip, n, d, e), n rounded up to a power of two -> tokens and width of a tile that measurements on that chip favour over the rule's.
# Empty: the kernel has been compiled for every chip here, but not yet timed on one.
TILES: dict[tuple[str, int, int, int], tuple[int, int]] = {}


def refuses(k: int, e: int) -> str | None:
    """Why the kernel cannot run, or None."""
    if e > MAX_EXPERTS:
        return f"{e} experts; the logits of a tile of tokens must fit in VMEM, which they do up to {MAX_EXPERTS}"
    return f"k={k}; its rounds are unrolled, up to {MAX_K}" if k > MAX_K else None


def choose_tiles(n: int, d: int, e: int, x_bytes: int, w_bytes: int) -> tuple[int, int]:
    """Tokens and width of a tile: the table's, or the most whole rows of x that fit, so that w is read once and stays in VMEM.

    Where w is too wide for that, 128 tokens and a power of two of the width, and w is read once per 128 tokens.
    """
    if tiles := TILES.get((current_chip().kind, pl.next_power_of_2(n), d, e)):
        return tiles

    def fits(rows: int, width: int) -> bool:
        lanes = pl.cdiv(e, 128) * 128
        return 2 * rows * width * x_bytes + 2 * width * lanes * w_bytes + 44 * rows * lanes <= _vmem() * 3 // 8

    if d <= STEP or d % 128 == 0:
        for rows in (512, 256, 128):
            if fits(rows, d):
                return min(rows, n), d
    width = next(w for w in (4096, 2048, 1024, 512, 256, 128) if w < d and (fits(128, w) or w == 128))
    return min(128, n), width


def _vmem() -> int:
    """Bytes of VMEM; v5e's where the chip is no TPU (the interpreter) or an unknown one."""
    return TPUS.get(current_chip().kind, TPUS["v5e"]).vmem


def step_of(width: int) -> int:
    """How much of a tile's width one product takes: all of a narrow one, else a multiple of 128 that divides it."""
    return width if width <= STEP else next(step for step in range(STEP, 0, -128) if width % step == 0)


def route(
    x: Array,
    w: Array,
    bias: Array | None,
    valid: Array,
    rule: Rule,
    interpret: bool = False,
    tiles: tuple[int, int] | None = None,
) -> Routed:
    """See the package. `tiles`: tokens (a multiple of 128, or n) and width (a multiple of 128, or d) of a tile."""
    (n, d), e, k = x.shape, w.shape[1], rule.k
    parts = float32_parts(x, w)
    x = x.astype(parts.dtype)
    rows, width = tiles or choose_tiles(n, d, e, x.dtype.itemsize, parts.shape[0] * parts.dtype.itemsize)
    steps = pl.cdiv(n, rows)
    biases = [] if bias is None else [bias[:, None]]
    expert, weight, logits, sums, z = pl.pallas_call(
        partial(_kernel, rule=rule, n=n, d=d),
        grid=(steps, pl.cdiv(d, width)),
        in_specs=[
            pl.BlockSpec((rows, width), lambda i, j: (i, j)),
            pl.BlockSpec((parts.shape[0], width, e), lambda i, j: (0, j, 0)),
            pl.BlockSpec((1, rows), lambda i, j: (0, i)),
            *[pl.BlockSpec((e, 1), lambda i, j: (0, 0)) for _ in biases],
        ],
        out_specs=[
            pl.BlockSpec((k, rows), lambda i, j: (0, i)),
            pl.BlockSpec((k, rows), lambda i, j: (0, i)),
            pl.BlockSpec((rows, e), lambda i, j: (i, 0)),
            pl.BlockSpec((1, e, 2), lambda i, j: (i, 0, 0)),
            pl.BlockSpec((1, rows), lambda i, j: (0, i)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((k, n), jnp.int32),
            jax.ShapeDtypeStruct((k, n), jnp.float32),
            jax.ShapeDtypeStruct((n, e), jnp.float32),
            jax.ShapeDtypeStruct((steps, e, 2), jnp.float32),
            jax.ShapeDtypeStruct((1, n), jnp.float32),
        ],
        scratch_shapes=[pltpu.VMEM((rows, e), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_vmem() * 5 // 8),
        cost_estimate=pl.CostEstimate(
            flops=2 * n * d * e * parts.shape[0],
            transcendentals=n * e,
            bytes_accessed=x.nbytes + parts.nbytes * (1 if width >= d else steps) + 4 * n * (e + 2 * k + 2),
        ),
        interpret=pltpu.InterpretParams(detect_races=True) if interpret else False,
        name="route",
    )(x, parts, valid.astype(jnp.int32)[None], *biases)
    counts, importance = sums.sum(0).T
    return Routed(expert.T, weight.T, logits, counts.astype(jnp.int32), importance, z[0])


def _kernel(x_ref: Any, w_ref: Any, valid_ref: Any, *refs: Any, rule: Rule, n: int, d: int) -> None:
    """Refs: [bias], expert, weight, logits, sums (counts and importance of this tile), z; accumulator."""
    *bias_ref, expert_ref, weight_ref, logits_ref, sums_ref, z_ref, accumulator = refs
    i, j = pl.program_id(0), pl.program_id(1)
    rows, width = x_ref.shape

    @pl.when(j == 0)
    def _() -> None:
        accumulator[...] = jnp.zeros_like(accumulator)

    precision = jax.lax.Precision.HIGHEST if x_ref.dtype == jnp.float32 else None
    step = step_of(width)

    def product(s: Array, _: None) -> None:
        piece = pl.ds(s * step if width == step else pl.multiple_of(s * step, 128), step)
        x, parts = x_ref[:, piece], [w_ref[p, piece] for p in range(w_ref.shape[0])]
        if d % width:  # what a tile holds past the end of d is undefined, on both sides of the product
            left = d - j * width - s * step
            x = jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) < left, x, 0)
            parts = [jnp.where(jax.lax.broadcasted_iota(jnp.int32, p.shape, 0) < left, p, 0) for p in parts]
        for part in parts:
            accumulator[...] += jnp.dot(x, part, precision=precision, preferred_element_type=jnp.float32)

    jax.lax.fori_loop(0, width // step, product, None)

    @pl.when(j == pl.num_programs(1) - 1)
    def _() -> None:
        logits = accumulator[...]
        logits_ref[...] = logits
        choice = choose(logits.T, bias_ref[0][...] if bias_ref else None, rule, 0)
        for r in range(rule.k):
            expert_ref[r : r + 1, :] = jnp.minimum(choice.expert[r], logits.shape[1] - 1)
            weight_ref[r : r + 1, :] = choice.weight[r]
        z_ref[...] = choice.z
        inside = jax.lax.broadcasted_iota(jnp.int32, (1, rows), 1) < n - i * rows
        here = inside & (valid_ref[...] != 0)
        sums_ref[0, :, 0:1] = jnp.sum(jnp.where(choice.chosen & here, 1.0, 0.0), axis=1, keepdims=True)
        sums_ref[0, :, 1:2] = jnp.sum(jnp.where(here, choice.scores, 0.0), axis=1, keepdims=True)
