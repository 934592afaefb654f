"""Moving tokens into expert order and back, with the weights of the plan folded in.

Row r of the sorted list holds choice `order[r]` of the flat token-major list (choice i belongs to token i // k), and `inverse` is
the inverse permutation. Because both directions are known, neither the forward nor the backward pass ever scatters: a gather's
derivative here is a gather by the inverse, which CPU, GPU and TPU all do faster than scatter-add.

All of it is two functions of gathered rows, which an implementation provides, without derivatives of their own:

    gather_sum(source[s, d], index[n, k], weight[n, k] or None) -> y[n, d]
        y[t] = sum_j weight[t, j] * source[index[t, j]]
    gather_scale_dot(source[s, d], index[m], rows[m, d], weight[m]) -> scaled[m, d], dots[m]
        scaled[r] = weight[r] * source[index[r]]     dots[r] = rows[r] . source[index[r]], in float32

`permute` is a `gather_sum` of one row each, `unpermute` and the gradient of `permute` are `gather_sum`s of k, and the gradient of
`unpermute` is `gather_scale_dot`. Sums are float32, weights stay float32, and results have the rows' dtype.

Contract, for every implementation: an entry of weight zero adds nothing to y, whatever its row holds, infinities and NaN included.
The weight's own gradient is what it is, `dy . row`, since a weight of zero may be a used choice's: callers that write
`where(used, weight, 0)`, as plans do, keep NaN of unused rows out of it.

What moves, in HBM and in multiples of the n * k * d rows' bytes, and what 'auto' picks from it:

                        TPU, xla   TPU kernel, float32 / bfloat16     GPU
    permute             2          2 / 3                              2, XLA and the kernel alike
    unpermute           3 + 1/k    1 + 1/k / 2 + 1/k                  1 + 1/k, likewise
    its gradients       5          3 / 4                              3, likewise

This counts the arrays that are read and written. The TPU compiler's own estimate charges XLA's gathers eight rows for each, a whole
tile of HBM: 10, 11 and 14 where the table says 2, 3 + 1/k and 5. XLA writes what it gathered, while the kernels consume it in VMEM;
they copy bfloat16 rows in pairs (permute/tpu.py says why). A copy per row costs the scalar core tens of cycles, in which HBM moves some
kilobytes: below `NARROW` bytes a row the kernels would wait for the scalar core. So 'auto' on TPU is XLA for `permute`, which has no
sum to keep in VMEM, and for narrow rows, and the kernel for the rest. All of that is counting: nothing here has been timed on a TPU.
On GPU XLA can fuse the gathers with what follows and then moves the same bytes as the kernel; 'auto' is XLA.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.implementations import resolve
from pallas_kernels.permute import gpu, tpu, xla

Auto = Mapping[str, tuple[str, ...]]
AUTO = {"cpu": ("xla",), "tpu": ("tpu", "xla"), "gpu": ("xla",)}
AUTO_XLA = {"cpu": ("xla",)}
NARROW = 4096  # bytes of a row


def permute(
    x: Float[Array, "n d"], order: Int[Array, "m"], inverse: Int[Array, "q"], k: int, implementation: str = "auto"
) -> Float[Array, "m d"]:
    """`rows[r] = x[order[r] // k]`, with q = n * k choices and m = q rows.

    There may be fewer rows: then the last is of an unused choice, with a gradient of zero, and stands for all choices without a row.

    Args:
      x: tokens.
      order: the choice, token * k + j, that each row holds.
      inverse: the row that holds each choice: `argsort(order)`.
      k: choices per token.
      implementation: 'auto' picks by platform and sizes, for the gradient too; a name runs that one or raises.

    Raises:
      ValueError: unknown implementation, or a named one that cannot do this call.
    """
    (m,), (n, d) = order.shape, x.shape
    # A gather alone has no sum to save the writing of.
    forward = _choose("permute", implementation, n, d, x.dtype, 1, AUTO_XLA)
    return _permute(x, order, inverse, k, forward, _choose("permute", implementation, m, d, x.dtype, k))


def unpermute(
    rows: Float[Array, "m d"],
    weight: Float[Array, "n k"],
    order: Int[Array, "m"],
    inverse: Int[Array, "q"],
    implementation: str = "auto",
) -> Float[Array, "n d"]:
    """`y[t] = sum_j weight[t, j] * rows[inverse[t * k + j]]`: outputs back in token order, weighted and summed over choices.

    Args:
      rows: outputs in expert order.
      weight: of each choice; 0 for unused ones.
      order: the choice that each row holds.
      inverse: the row that holds each choice.
      implementation: 'auto' picks by platform and sizes, for the gradient too; a name runs that one or raises.

    Raises:
      ValueError: unknown implementation, or a named one that cannot do this call.
    """
    (n, k), (m, d) = weight.shape, rows.shape
    forward = _choose("unpermute", implementation, m, d, rows.dtype, k)
    return _unpermute(rows, weight, order, inverse, forward, _choose("unpermute", implementation, n, d, rows.dtype, 1))


def _choose(operation: str, implementation: str, num_rows: int, d: int, dtype: jnp.dtype, k: int, auto: Auto = AUTO) -> str:
    """The implementation that gathers k at a time of `num_rows` rows of width d."""
    refusals = {"tpu": tpu.refuses, "interpret_tpu": tpu.refuses, "gpu": gpu.refuses, "interpret_gpu": gpu.refuses}
    return resolve(
        operation,
        implementation,
        tuple(IMPLEMENTATIONS),
        AUTO_XLA if d * dtype.itemsize < NARROW else auto,
        lambda name: refusals[name](num_rows, d, dtype, k) if name in refusals else None,
    )


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _permute(x: Array, order: Array, inverse: Array, k: int, forward: str, backward: str) -> Array:
    return IMPLEMENTATIONS[forward].gather_sum(x, (order // k)[:, None], None)


def _permute_fwd(x: Array, order: Array, inverse: Array, k: int, forward: str, backward: str) -> tuple[Array, Array]:
    return _permute(x, order, inverse, k, forward, backward), inverse


def _permute_bwd(k: int, forward: str, backward: str, inverse: Array, drows: Array) -> tuple[Array, None, None]:
    return IMPLEMENTATIONS[backward].gather_sum(drows, inverse.reshape(-1, k), None), None, None


_permute.defvjp(_permute_fwd, _permute_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _unpermute(rows: Array, weight: Array, order: Array, inverse: Array, forward: str, backward: str) -> Array:
    return IMPLEMENTATIONS[forward].gather_sum(rows, inverse.reshape(weight.shape), weight)


def _unpermute_fwd(
    rows: Array, weight: Array, order: Array, inverse: Array, forward: str, backward: str
) -> tuple[Array, tuple[Array, ...]]:
    return _unpermute(rows, weight, order, inverse, forward, backward), (rows, weight, order, inverse)


def _unpermute_bwd(forward: str, backward: str, residuals: tuple[Array, ...], dy: Array) -> tuple[Array, Array, None, None]:
    rows, weight, order, inverse = residuals
    token, row_weight = order // weight.shape[1], weight.reshape(-1)[order]
    drows, dots = IMPLEMENTATIONS[backward].gather_scale_dot(dy, token, rows, row_weight)
    return drows, dots[inverse].reshape(weight.shape).astype(weight.dtype), None, None


_unpermute.defvjp(_unpermute_fwd, _unpermute_bwd)


def _reference_sum(source: Array, index: Array, weight: Array | None) -> Array:
    rows = source[index].astype(jnp.float32)
    if weight is not None:
        rows = jnp.where(weight[..., None] != 0, weight[..., None] * rows, 0)
    return rows.sum(1).astype(source.dtype)


def _reference_scale_dot(source: Array, index: Array, rows: Array, weight: Array) -> tuple[Array, Array]:
    scaled = weight[:, None] * source[index]
    return scaled.astype(source.dtype), (rows.astype(jnp.float32) * source[index]).sum(1)


class Implementation(NamedTuple):
    """The two functions; see the module's docstring."""

    gather_sum: Callable[[Array, Array, Array | None], Array]
    gather_scale_dot: Callable[[Array, Array, Array, Array], tuple[Array, Array]]


IMPLEMENTATIONS: dict[str, Implementation] = {
    "reference": Implementation(_reference_sum, _reference_scale_dot),
    "xla": Implementation(xla.gather_sum, xla.gather_scale_dot),
    "tpu": Implementation(tpu.gather_sum, tpu.gather_scale_dot),
    "gpu": Implementation(gpu.gather_sum, gpu.gather_scale_dot),
    "interpret_tpu": Implementation(partial(tpu.gather_sum, interpret=True), partial(tpu.gather_scale_dot, interpret=True)),
    "interpret_gpu": Implementation(partial(gpu.gather_sum, interpret=True), partial(gpu.gather_scale_dot, interpret=True)),
}

__all__ = ["AUTO", "AUTO_XLA", "IMPLEMENTATIONS", "NARROW", "permute", "unpermute"]
