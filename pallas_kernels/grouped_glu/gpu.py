"""Fused GLU for NVIDIA GPUs: Pallas kernels that Triton compiles, on the visits and tiles of `grouped_matmul.gpu`.

    forward    x read once for both products; `act(gate) * up` written, and where a derivative will follow gate and up as well
    dgate, dup elementwise from dh, gate and up: left to XLA. Computed between memory and the tensor cores they would have to pass
               through registers, once per tile of d, where operands that are read as they are go from memory to shared memory
    dx         `dgate W_gate^T + dup W_up^T` in one kernel and one accumulator
    dW         two calls of `grouped_matmul.gpu.tgmm`

Device memory in elements, as far as the L2 cache serves what is read again: forward m d + 2 e d f + m f (3 m f when gate and up are
kept), dgate and dup 5 m f, dx 2 m f + 2 e d f + m d, dW 2 m d + 2 m f + 2 e d f. Two grouped matmuls and elementwise passes
would move 4 m f + m d more forward (2 m f + m d when gate and up are kept), and 3 m d more backward.

Activations that Triton's lowering does not know (`in_kernel`: exact GELU's error function) are left to XLA, from gate and up.

A program of the forward kernel has two accumulators: as many registers as a grouped matmul with twice the columns.
"""

import math
import re
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_matmul.gpu import (
    INTERPRET,
    Ref,
    Span,
    Table,
    Tiles,
    dot,
    dot_precision,
    for_visit,
    gmm_sum,
    load_tile,
    program_order,
    refuses,
    store_tile,
    tgmm,
    tiles_for,
    visits_table,
)

__all__ = ["INTERPRET", "TILES", "glu", "refuses"]

# As in `grouped_matmul.gpu`, of which are timed. "glu_dx" is two matrix products in one.
_LARGE: Table = {
    ("glu", 2, 16): Tiles(64, 128, 64, warps=8, stages=3),
    ("glu", 2, 64): Tiles(64, 64, 64, warps=4, stages=4),
    ("glu", 2, math.inf): Tiles(128, 128, 64, warps=8, stages=3),
    ("glu_dx", 2, 16): Tiles(64, 128, 64, warps=4, stages=4),
    ("glu_dx", 2, 64): Tiles(64, 128, 64, warps=4, stages=3),
    ("glu_dx", 2, math.inf): Tiles(128, 128, 64, warps=8, stages=3),
}
TILES: dict[str, Table] = {
    "default": {
        ("glu", 2, 16): Tiles(16, 64, 64, warps=4, stages=4),
        ("glu", 2, 64): Tiles(64, 64, 64, warps=4, stages=3),
        ("glu", 2, math.inf): Tiles(128, 128, 32, warps=8, stages=4),
        ("glu", 4, 16): Tiles(16, 32, 32, warps=4, stages=3),
        ("glu", 4, math.inf): Tiles(64, 64, 32, warps=8, stages=3),
        ("glu_dx", 2, 16): Tiles(16, 128, 32, warps=4, stages=4),
        ("glu_dx", 2, 64): Tiles(64, 128, 32, warps=4, stages=3),
        ("glu_dx", 2, math.inf): Tiles(128, 128, 32, warps=8, stages=3),
        ("glu_dx", 4, 16): Tiles(16, 64, 32, warps=4, stages=3),
        ("glu_dx", 4, math.inf): Tiles(64, 64, 32, warps=8, stages=3),
    },
    "a100": {},
    "h100": _LARGE,
    "h200": _LARGE,
    "b200": _LARGE | {("glu", 2, math.inf): Tiles(128, 64, 64, warps=8, stages=4)},
}
# Tiles of [rows, depth] and of [depth, columns] that a step reads.
OPERANDS = {"glu": (1, 2), "glu_dx": (2, 2)}

Activation = Callable[[Array], Array]


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def glu(
    x: Float[Array, "m d"],
    w_gate: Float[Array, "e0 d f"],
    w_up: Float[Array, "e0 d f"],
    group_sizes: Int[Array, "e"],
    group_offset: Int[Array, ""],
    activation: Activation,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Float[Array, "m f"]:
    """`activation(x w_gate) * (x w_up)`; see the package."""
    return _forward(x, w_gate, w_up, group_sizes, group_offset, activation, tiles, interpret, keep=False)[0]


def _fwd(
    x: Array,
    w_gate: Array,
    w_up: Array,
    group_sizes: Array,
    group_offset: Array,
    activation: Activation,
    tiles: Tiles | None,
    interpret: bool,
) -> tuple[Array, tuple[Array, ...]]:
    h, gate, up = _forward(x, w_gate, w_up, group_sizes, group_offset, activation, tiles, interpret, keep=True)
    return h, (x, w_gate, w_up, group_sizes, group_offset, gate, up)


def _bwd(
    activation: Activation, tiles: Tiles | None, interpret: bool, residuals: tuple[Array, ...], dh: Array
) -> tuple[Array | None, ...]:
    x, w_gate, w_up, group_sizes, group_offset, gate, up = residuals
    dh, gate, up = (a.astype(jnp.float32) for a in (dh, gate, up))
    activated, derivative = jax.vjp(activation, gate)
    (dgate,) = derivative(dh * up)
    grads = [a.astype(x.dtype) for a in (dgate, dh * activated)]
    (m, d), f = x.shape, w_gate.shape[2]
    tiles_dx = tiles or tiles_for("glu_dx", x.dtype, m, group_sizes.shape[0], TILES).within(columns=d, depth=f)
    dx = gmm_sum(grads, [w_gate, w_up], group_sizes, group_offset, True, tiles_dx, interpret, "grouped_glu_dx")
    dw_gate, dw_up = (tgmm(x, a, group_sizes, group_offset, w_gate.shape[0], w_gate.dtype, tiles, interpret) for a in grads)
    return dx, dw_gate, dw_up, None, None


glu.defvjp(_fwd, _bwd)


def _forward(
    x: Array,
    w_gate: Array,
    w_up: Array,
    group_sizes: Array,
    group_offset: Array,
    activation: Activation,
    tiles: Tiles | None,
    interpret: bool,
    keep: bool,
) -> Sequence[Array]:
    """The hidden units, and with `keep` gate and up."""
    (m, d), (held, _, f), dtype = x.shape, w_gate.shape, x.dtype
    if 0 in (m, d, f):
        return [jnp.zeros((m, f), dtype)] * 3
    if not in_kernel(activation):
        name, count, after = "grouped_glu_products", 2, lambda gate, up: (gate, up)
    elif keep:
        name, count, after = "grouped_glu_saving", 3, lambda gate, up: (activation(gate) * up, gate, up)
    else:
        name, count, after = "grouped_glu", 1, lambda gate, up: (activation(gate) * up,)
    tiles = tiles or tiles_for("glu", dtype, m, group_sizes.shape[0], TILES).within(columns=f, depth=d)
    visits = visits_table(group_sizes, group_offset, held, m, tiles.rows)
    outputs = pl.pallas_call(
        partial(_kernel, after=after, tiles=tiles, precision=dot_precision(dtype)),
        out_shape=[jax.ShapeDtypeStruct((m, f), dtype)] * count,
        grid=(visits.shape[1] * pl.cdiv(f, tiles.columns),),
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        cost_estimate=pl.CostEstimate(
            flops=4 * m * d * f,
            bytes_accessed=(x.size + w_gate.size + w_up.size + count * m * f) * dtype.itemsize,
            transcendentals=m * f,
        ),
        interpret=interpret,
        name=name,
    )(visits, x, w_gate, w_up)
    if in_kernel(activation):
        return outputs
    gate, up = (a.astype(jnp.float32) for a in outputs)
    return (activation(gate) * up).astype(dtype), *outputs


def in_kernel(activation: Activation) -> bool:
    """Whether Triton's lowering knows what an activation is made of."""
    made_of = str(jax.make_jaxpr(activation)(jax.ShapeDtypeStruct((), jnp.float32)))
    return re.search(r"\b(erfc?|custom_vjp_call)\b", made_of) is None


def _kernel(
    visits_ref: Ref,
    x_ref: Ref,
    gate_ref: Ref,
    up_ref: Ref,
    *out_refs: Ref,
    after: Callable[[Array, Array], tuple[Array, ...]],
    tiles: Tiles,
    precision: lax.Precision | None,
) -> None:
    d, f = x_ref.shape[1], gate_ref.shape[2]
    visit, column = program_order(pl.program_id(0), visits_ref.shape[1], pl.cdiv(f, tiles.columns), tiles.band)

    def compute(group: Array, start: Array, stop: Array) -> None:
        rows, columns = Span(start, tiles.rows, stop), Span.of(column, tiles.columns, f)

        def step(k: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
            depth = Span.of(k, tiles.depth, d)
            x = load_tile(x_ref, rows, depth)
            matrices = (load_tile(ref, depth, columns, group=jnp.maximum(group, 0)) for ref in (gate_ref, up_ref))
            return tuple(y + dot(x, w, (1, 0), precision) for y, w in zip(sums, matrices, strict=True))

        # Nothing is added up in rows of no computed group. Typed: see grouped_matmul.
        steps = jnp.where(group < 0, jnp.int32(0), jnp.int32(pl.cdiv(d, tiles.depth)))
        zeros = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)
        gate, up = lax.fori_loop(0, steps, step, (zeros, zeros))
        for ref, value in zip(out_refs, after(gate, up), strict=True):
            store_tile(ref, value, rows, columns)

    for_visit(visits_ref, visit, compute)
