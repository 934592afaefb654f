"""Fused GLU on TPU, made of `grouped_matmul`'s two kernels.

    forward    x read once, two products in VMEM, `act(gate) * up` written: gate and up never see HBM
    forward, when a derivative will follow: writes gate and up as well, 2 m f elements
    dx         reads dh, gate and up, computes both products' gradients in VMEM, and writes `dgate W_gate^T + dup W_up^T` once
    dW         reads x and dh, gate and up, and writes both matrices' gradients

HBM traffic in elements, with one tile of columns each: forward m d + 2 e d f + m f (3 m f when gate and up are kept), dx
3 m f + 2 e d f + m d, dW m d + 3 m f + 2 e d f. Grouped matmuls with elementwise passes around them move 4 m f + m d more forward
(2 m f + m d when gate and up are kept), and 3 m f + 5 m d more backward.

Recomputing gate and up in the backward pass instead would save their 4 m f bytes (bfloat16) for 2/3 of the forward's FLOPs:
`jax.checkpoint` around the expert does that.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.grouped_matmul.tiles import Tiles
from pallas_kernels.grouped_matmul.tpu import INTERPRET, Interpret, groups_by_rows, refuses, rows_by_groups

__all__ = ["INTERPRET", "glu", "refuses"]

Activation = Callable[[Array], Array]


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def glu(
    x: Array,
    w_gate: Array,
    w_up: Array,
    group_sizes: Array,
    group_offset: Array,
    activation: Activation,
    tiles: Tiles | None = None,
    interpret: Interpret = False,
) -> Array:
    """`activation(x w_gate) * (x w_up)`; see the package."""
    (h,) = rows_by_groups(
        (x,), (w_gate, w_up), group_sizes, group_offset, name="grouped_glu", tiles=tiles, interpret=interpret,
        after=lambda gate, up: (activation(gate) * up,),
    )  # fmt: skip
    return h


def _fwd(
    x: Array,
    w_gate: Array,
    w_up: Array,
    group_sizes: Array,
    group_offset: Array,
    activation: Activation,
    tiles: Tiles | None,
    interpret: Interpret,
) -> tuple[Array, tuple[Array, ...]]:
    h, gate, up = rows_by_groups(
        (x,), (w_gate, w_up), group_sizes, group_offset, name="grouped_glu_saving", tiles=tiles, interpret=interpret,
        after=lambda gate, up: (activation(gate) * up, gate, up), num_outputs=3,
    )  # fmt: skip
    return h, (x, w_gate, w_up, group_sizes, group_offset, gate, up)


def _bwd(
    activation: Activation, tiles: Tiles | None, interpret: Interpret, residuals: tuple[Array, ...], dh: Array
) -> tuple[Array | None, ...]:
    x, w_gate, w_up, group_sizes, group_offset, gate, up = residuals
    options = dict(tiles=tiles, interpret=interpret, before=partial(_unit_gradients, activation))
    (dx,) = rows_by_groups(
        (dh, gate, up), (w_gate, w_up), group_sizes, group_offset, name="grouped_glu_dx", transpose=True,
        after=lambda from_gate, from_up: (from_gate + from_up,), **options,
    )  # fmt: skip
    dw_gate, dw_up = groups_by_rows(
        x, (dh, gate, up), group_sizes, group_offset, w_gate.shape[0], w_gate.dtype, name="grouped_glu_dw", num_outputs=2,
        **options,
    )  # fmt: skip
    return dx, dw_gate, dw_up, None, None


glu.defvjp(_fwd, _bwd)


def _unit_gradients(activation: Activation, dh: Array, gate: Array, up: Array) -> tuple[Array, Array]:
    """Gradients of gate and up from that of `activation(gate) * up`, in float32."""
    dh, gate, up = (a.astype(jnp.float32) for a in (dh, gate, up))
    activated, derivative = jax.vjp(activation, gate)
    (dgate,) = derivative(dh * up)
    return dgate, dh * activated
