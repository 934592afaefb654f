"""Fused GLU in plain XLA: two grouped matmuls, each with its own pass over the rows."""

from collections.abc import Callable

from jaxtyping import Array

from pallas_kernels.grouped_matmul import grouped_matmul


def glu(
    x: Array, w_gate: Array, w_up: Array, group_sizes: Array, group_offset: Array, activation: Callable[[Array], Array]
) -> Array:
    """`activation(x w_gate) * (x w_up)`; see the package."""
    gate, up = (grouped_matmul(x, w, group_sizes, "xla", group_offset) for w in (w_gate, w_up))
    return activation(gate) * up
