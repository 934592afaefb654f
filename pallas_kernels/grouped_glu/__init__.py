"""Fused gated linear unit of grouped rows: `act(x W_gate) * (x W_up)`, each row with its own group's two matrices.

Contract, for every implementation: as `grouped_matmul`'s. Rows of no computed group are zero and get zero gradients, empty groups
get zero gradients, any sizes of m, d and f, an offset into the groups.

An implementation is one function that JAX can differentiate:

    glu(x[m, d], w_gate[e0, d, f], w_up[e0, d, f], group_sizes[e], group_offset, activation) -> h[m, f]

Implementations, besides those of `pallas_kernels.implementations`:
  xla   two calls of `grouped_matmul`'s xla loops.
  tpu   one kernel that reads x once, and two for the derivative; see `tpu.py` for the bytes.
  gpu   one kernel that reads x once, and three for the derivative; see `gpu.py`.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_glu import gpu, tpu, xla
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.implementations import resolve

Activation = Callable[[Array], Array]

AUTO = {"cpu": ("xla",), "tpu": ("tpu",), "gpu": ("gpu", "reference")}


def grouped_glu(
    x: Float[Array, "m d"],
    w_gate: Float[Array, "e0 d f"],
    w_up: Float[Array, "e0 d f"],
    group_sizes: Int[Array, "e"],
    activation: Activation = jax.nn.silu,
    implementation: str = "auto",
    group_offset: Int[Array, ""] | int | None = None,
) -> Float[Array, "m f"]:
    """`h[r] = activation(x[r] @ w_gate[i]) * (x[r] @ w_up[i])` for each row r of group i.

    Args:
      x: rows sorted by group.
      w_gate: one matrix per group, for the e0 groups from `group_offset` on.
      w_up: as `w_gate`.
      group_sizes: rows of each group; their sum is at most m.
      activation: elementwise and differentiable.
      implementation: 'auto' picks by platform; a name runs that one or raises.
      group_offset: first group of the matrices; None when they are of all groups.

    Raises:
      ValueError: unknown implementation, or fewer matrices than groups without a `group_offset`.
    """
    if group_offset is None and w_gate.shape[0] != group_sizes.shape[0]:
        raise ValueError(
            f"w_gate holds {w_gate.shape[0]} matrices for {group_sizes.shape[0]} groups; "
            "give group_offset, the first group that it holds"
        )

    def refuses(name: str) -> str | None:
        return REFUSES[name](x, w_gate, w_up) if name in REFUSES else None

    name = resolve("grouped_glu", implementation, tuple(IMPLEMENTATIONS), AUTO, refuses)
    offset = jnp.asarray(0 if group_offset is None else group_offset, jnp.int32)
    return IMPLEMENTATIONS[name](x, w_gate, w_up, group_sizes, offset, activation)


def _reference(x: Array, w_gate: Array, w_up: Array, group_sizes: Array, group_offset: Array, activation: Activation) -> Array:
    gate, up = (grouped_matmul(x, w, group_sizes, "reference", group_offset) for w in (w_gate, w_up))
    return activation(gate) * up


IMPLEMENTATIONS: dict[str, Callable[..., Array]] = {
    "reference": _reference,
    "xla": xla.glu,
    "tpu": tpu.glu,
    "interpret_tpu": partial(tpu.glu, **tpu.INTERPRET),
    "gpu": gpu.glu,
    "interpret_gpu": partial(gpu.glu, **gpu.INTERPRET),
}
# Why an implementation cannot take some arrays, if it cannot take all.
REFUSES: dict[str, Callable[..., str | None]] = {
    "tpu": tpu.refuses,
    "interpret_tpu": tpu.refuses,
    "gpu": gpu.refuses,
    "interpret_gpu": gpu.refuses,
}
