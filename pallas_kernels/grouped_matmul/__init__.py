"""Grouped matmul: rows sorted by group, each group times its own matrix.

Contract, for every implementation: rows of no computed group are zero, empty groups get zero gradients, any sizes of m, d and f.

Implementations, besides those of `pallas_kernels.implementations`:
  xla         loops over groups and tiles whose trip counts follow the group sizes: the cost is that of the rows that are there.
              The choice on CPU.
  tpu         reads each matrix once and rows once per tile of columns, for groups of any sizes. The choice on TPU.
  ragged_dot  `jax.lax.ragged_dot`; has kernels on TPU. On CPU, and on NVIDIA GPUs by default, it is a masked dense product over all
              groups: e times the FLOPs, and a temporary of e copies of x: on an H200, 8 groups take 5 to 6 times as long as by `gpu`,
              64 take 40 times.

Each implementation is a pair of functions, without derivatives of their own:

    gmm(x[m, d], w[e0, d, f], group_sizes[e], group_offset, transpose) -> y[m, f]     (transpose: w is [e0, f, d])
    tgmm(x[m, d], dy[m, f], group_sizes[e], group_offset, num_groups=e0, dtype) -> dw[e0, d, f]   of dtype, summed in float32

`w` holds the e0 groups from `group_offset` on: a device's slice of the experts, with `group_sizes` and rows of all of them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_matmul import gpu, tpu, xla
from pallas_kernels.implementations import resolve

AUTO = {"cpu": ("xla",), "tpu": ("tpu", "ragged_dot"), "gpu": ("gpu", "ragged_dot")}


def grouped_matmul(
    x: Float[Array, "m d"],
    w: Float[Array, "e0 d f"],
    group_sizes: Int[Array, "e"],
    implementation: str = "auto",
    group_offset: Int[Array, ""] | int | None = None,
) -> Float[Array, "m f"]:
    """`y[r] = x[r] @ w[group of r - group_offset]` where group i owns the next `group_sizes[i]` rows.

    Rows of groups that `w` does not hold, and rows past the last group, give zero.

    Args:
      x: rows sorted by group.
      w: one matrix per group, for the e0 groups from `group_offset` on.
      group_sizes: rows of each group; their sum is at most m.
      implementation: 'auto' picks by platform; a name runs that one or raises.
      group_offset: first group of `w`; None when `w` holds them all.

    Raises:
      ValueError: unknown implementation, or fewer matrices than groups without a `group_offset`.
    """
    if group_offset is None and w.shape[0] != group_sizes.shape[0]:
        raise ValueError(
            f"w holds {w.shape[0]} matrices for {group_sizes.shape[0]} groups; give group_offset, the first group that w holds"
        )

    def refuses(name: str) -> str | None:
        if name in ("gpu", "interpret_gpu"):
            return gpu.refuses(x, w)
        if name in ("tpu", "interpret_tpu"):
            return tpu.refuses(x, w)
        return "it takes no group_offset" if name == "ragged_dot" and group_offset is not None else None

    name = resolve("grouped_matmul", implementation, tuple(IMPLEMENTATIONS), AUTO, refuses)
    return _grouped_matmul(x, w, group_sizes, jnp.asarray(0 if group_offset is None else group_offset, jnp.int32), name)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _grouped_matmul(x: Array, w: Array, group_sizes: Array, group_offset: Array, name: str) -> Array:
    return IMPLEMENTATIONS[name].gmm(x, w, group_sizes, group_offset, False)


def _fwd(x: Array, w: Array, group_sizes: Array, group_offset: Array, name: str) -> tuple[Array, tuple[Array, ...]]:
    return _grouped_matmul(x, w, group_sizes, group_offset, name), (x, w, group_sizes, group_offset)


def _bwd(name: str, residuals: tuple[Array, ...], dy: Array) -> tuple[Array, Array, None, None]:
    x, w, group_sizes, group_offset = residuals
    gmm, tgmm = IMPLEMENTATIONS[name]
    dx = gmm(dy, w, group_sizes, group_offset, True)
    return dx, tgmm(x, dy, group_sizes, group_offset, w.shape[0], w.dtype), None, None


_grouped_matmul.defvjp(_fwd, _bwd)


def group_of_row(group_sizes: Int[Array, "e"], m: int) -> Int[Array, "m"]:
    """Each row's group; e for rows past the last group."""
    return jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(m), side="right").astype(jnp.int32)


def _member(group_sizes: Array, group_offset: Array, m: int, num_groups: int, dtype: DTypeLike) -> Float[Array, "m e0"]:
    return jax.nn.one_hot(group_of_row(group_sizes, m) - group_offset, num_groups, dtype=dtype)


def _reference_gmm(x: Array, w: Array, group_sizes: Array, group_offset: Array, transpose: bool) -> Array:
    member = _member(group_sizes, group_offset, x.shape[0], w.shape[0], x.dtype)
    w = w.swapaxes(1, 2) if transpose else w
    return jnp.einsum("me,md,edf->mf", member, x, w, precision=jax.lax.Precision.HIGHEST)


def _reference_tgmm(x: Array, dy: Array, group_sizes: Array, group_offset: Array, num_groups: int) -> Array:
    member = _member(group_sizes, group_offset, x.shape[0], num_groups, jnp.float32) > 0
    rows, grads = (jnp.where(member[..., None], a[:, None].astype(jnp.float32), 0) for a in (x, dy))
    return jnp.einsum("med,mef->edf", rows, grads, precision=jax.lax.Precision.HIGHEST)


def _ragged_gmm(x: Array, w: Array, group_sizes: Array, group_offset: Array, transpose: bool) -> Array:
    del group_offset  # the entry point keeps slices away
    y = _ragged(x, w, group_sizes, contract=((1,), (2 if transpose else 1,)), ragged=0, group=(0,))
    return xla.zero_outside(y, 0, group_sizes.sum())


def _ragged_tgmm(x: Array, dy: Array, group_sizes: Array, group_offset: Array, num_groups: int) -> Array:
    del group_offset, num_groups
    return _ragged(x, dy, group_sizes, contract=((0,), (0,)), ragged=0, group=(), preferred_element_type=jnp.float32)


def _ragged(x: Array, y: Array, sizes: Array, contract: Any, ragged: int, group: tuple[int, ...], **options: Any) -> Array:
    numbers = jax.lax.RaggedDotDimensionNumbers((contract, ((), ())), [ragged], list(group))
    return jax.lax.ragged_dot_general(x, y, sizes, numbers, **options)


class Implementation(NamedTuple):
    """The two products; see the module's docstring."""

    gmm: Callable[[Array, Array, Array, Array, bool], Array]
    tgmm: Callable[[Array, Array, Array, Array, int, DTypeLike], Array]


def _rounded(tgmm: Callable[[Array, Array, Array, Array, int], Array]) -> Callable[..., Array]:
    """For those that give float32 and leave rounding to a second pass."""

    def rounded(x: Array, dy: Array, group_sizes: Array, group_offset: Array, num_groups: int, dtype: DTypeLike) -> Array:
        return tgmm(x, dy, group_sizes, group_offset, num_groups).astype(dtype)

    return rounded


IMPLEMENTATIONS: dict[str, Implementation] = {
    "reference": Implementation(_reference_gmm, _rounded(_reference_tgmm)),
    "xla": Implementation(xla.gmm, _rounded(xla.tgmm)),
    "ragged_dot": Implementation(_ragged_gmm, _rounded(_ragged_tgmm)),
    "tpu": Implementation(tpu.gmm, tpu.tgmm),
    "interpret_tpu": Implementation(partial(tpu.gmm, **tpu.INTERPRET), partial(tpu.tgmm, **tpu.INTERPRET)),
    "gpu": Implementation(gpu.gmm, _rounded(gpu.tgmm)),
    "interpret_gpu": Implementation(partial(gpu.gmm, **gpu.INTERPRET), _rounded(partial(gpu.tgmm, **gpu.INTERPRET))),
}
