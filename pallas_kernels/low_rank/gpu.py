"""Low-rank grouped matmul on NVIDIA GPUs (Triton): rows of one group per program, its narrow middle in registers.

A program takes a visit of `grouped_matmul.gpu`: up to `_ROWS` rows of one group. It sums x A over tiles of d into a [rows, r] tile of
registers, multiplies that by B for one tile of f after the other, and writes each once: A, B, x and y cross memory once per visit.
The tensor cores take 16 columns or more: smaller ranks are masked up to that, in registers only. Ranks above `_RANK` would
not fit into registers.

The gradient of x is the same kernel with A and B transposed; it also writes its middle, dz, [m, r]. With z, computed anew, that makes
the gradients of A and B two calls of `grouped_matmul.gpu.tgmm`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_matmul.gpu import INTERPRET as _INTERPRET
from pallas_kernels.grouped_matmul.gpu import (
    Ref,
    Span,
    dot,
    dot_precision,
    for_visit,
    gmm,
    load_tile,
    store_tile,
    tgmm,
    visits_table,
)
from pallas_kernels.grouped_matmul.gpu import refuses as _refuses_dtypes

_ROWS, _WIDTH, _RANK = 64, 64, 128  # of a tile of rows; of d and of f; the largest r


def refuses(x: Array, a: Array, b: Array) -> str | None:
    """Why the kernels cannot take these arrays, or None."""
    largest = _RANK if x.dtype.itemsize < 4 else _RANK // 2  # float32 of the largest rank spills
    return _refuses_dtypes(x, a, b) or (f"rank {a.shape[2]} of {x.dtype} exceeds {largest}" if a.shape[2] > largest else None)


def forward(
    x: Float[Array, "m d"],
    a: Float[Array, "e0 d r"],
    b: Float[Array, "e0 r f"],
    group_sizes: Int[Array, "e"],
    group_offset: Int[Array, ""],
    scale: float,
    interpret: bool = False,
) -> Float[Array, "m f"]:
    """`scale * (x A_g) B_g`; see the package."""
    return _chain(x, a, b, group_sizes, group_offset, scale, False, interpret)[0]


def backward(
    x: Float[Array, "m d"],
    dy: Float[Array, "m f"],
    a: Float[Array, "e0 d r"],
    b: Float[Array, "e0 r f"],
    group_sizes: Int[Array, "e"],
    group_offset: Int[Array, ""],
    scale: float,
    interpret: bool = False,
) -> tuple[Float[Array, "m d"], Float[Array, "e0 d r"], Float[Array, "e0 r f"]]:
    """Gradients of x, a and b, the last two in float32."""
    options = _INTERPRET if interpret else {}
    dx, dz = _chain(dy, b, a, group_sizes, group_offset, scale, True, interpret)
    z = gmm(x, a, group_sizes, group_offset, False, **options)
    da = tgmm(x, dz, group_sizes, group_offset, a.shape[0], **options)
    db = scale * tgmm(z, dy, group_sizes, group_offset, a.shape[0], **options)
    return dx, da, db


def _chain(
    x: Array,
    a: Array,
    b: Array,
    group_sizes: Array,
    group_offset: Array,
    scale: float,
    transpose: bool,
    interpret: bool,
) -> tuple[Array, ...]:
    """`scale * (x A) B`; with `transpose` A is [e0, r, d], B is [e0, f, r], and `scale * x A` [m, r] comes too."""
    m, e0 = x.shape[0], a.shape[0]
    r, f = a.shape[1 if transpose else 2], b.shape[1 if transpose else 2]
    visits = visits_table(group_sizes, group_offset, e0, m, _ROWS)
    outputs = [(m, f), (m, r)] if transpose else [(m, f)]
    return pl.pallas_call(
        partial(_kernel, scale=scale, transpose=transpose, rank=max(16, pl.next_power_of_2(r))),
        out_shape=[jax.ShapeDtypeStruct(shape, x.dtype) for shape in outputs],
        grid=(visits.shape[1],),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        cost_estimate=pl.CostEstimate(
            flops=2 * m * r * (x.shape[1] + f),
            bytes_accessed=x.dtype.itemsize * (x.size + a.size + b.size + m * f),
            transcendentals=0,
        ),
        interpret=interpret,
        name="low_rank_transposed" if transpose else "low_rank",
    )(visits, x, a, b)


def _kernel(
    visits_ref: Ref, x_ref: Ref, a_ref: Ref, b_ref: Ref, y_ref: Ref, *z_refs: Ref, scale: float, transpose: bool, rank: int
) -> None:
    d, f, r = x_ref.shape[1], y_ref.shape[1], a_ref.shape[1 if transpose else 2]
    precision = dot_precision(x_ref.dtype)
    inner = 1 if transpose else 0

    def compute(group: Array, start: Array, stop: Array) -> None:
        rows, middle, matrix = Span(start, _ROWS, stop), Span.of(jnp.int32(0), rank, r), jnp.maximum(group, 0)

        def down(k: Array, z: Array) -> Array:
            depth = Span.of(k, _WIDTH, d)
            narrow = load_tile(a_ref, *((middle, depth) if transpose else (depth, middle)), group=matrix)
            return z + dot(load_tile(x_ref, rows, depth), narrow, (1, inner), precision)

        # Rows of no computed group are visits as well, with nothing to add. Typed, as in grouped_matmul.
        steps = jnp.where(group < 0, jnp.int32(0), jnp.int32(pl.cdiv(d, _WIDTH)))
        z = jax.lax.fori_loop(0, steps, down, jnp.zeros((_ROWS, rank), jnp.float32))
        z = (scale * z).astype(x_ref.dtype)
        for z_ref in z_refs:
            store_tile(z_ref, z, rows, middle)

        def up(j: Array, _: None) -> None:
            columns = Span.of(j, _WIDTH, f)
            narrow = load_tile(b_ref, *((columns, middle) if transpose else (middle, columns)), group=matrix)
            y = dot(z, narrow, (1, inner), precision)
            store_tile(y_ref, jnp.where(group < 0, 0.0, y), rows, columns)

        jax.lax.fori_loop(0, pl.cdiv(f, _WIDTH), up, None)

    for_visit(visits_ref, pl.program_id(0), compute)
