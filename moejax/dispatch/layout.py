"""Layouts: how the rows of a bank's experts lie in memory.

A bank is written once against a few operations and never learns the layout:

    layout.dot(x, w)                  every row times its own expert's matrix `w[e, d, f]`
    layout.take(b)                    every row's own expert's vector `b[e, f]`, broadcastable against the rows
    layout.glu(x, w_gate, w_up, act)  `act(x w_gate) * (x w_up)`, which some kernels do in one pass
    layout.low_rank(x, a, b)          `(x a) b` through a narrow middle, likewise

so that each dispatch backend serves every kind of expert. Parameters are cast to the rows' dtype (bfloat16 compute on float32
parameters). `layout.map(function, params, x)` runs whole experts, `function(params, x, layout)`, which a layout may do piece by piece.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_glu import grouped_glu
from pallas_kernels.grouped_map import grouped_map
from pallas_kernels.grouped_matmul import AUTO, IMPLEMENTATIONS, grouped_matmul
from pallas_kernels.implementations import resolve
from pallas_kernels.low_rank import low_rank_grouped_matmul

Activation = Callable[[Array], Array]
Function = Callable[..., Array]


class Layout(ABC):
    """See the module's docstring; `*m` are the row axes of the layout."""

    @abstractmethod
    def dot(self, x: Float[Array, "*m d"], w: Float[Array, "e d f"]) -> Float[Array, "*m f"]: ...

    @abstractmethod
    def take(self, b: Float[Array, "e f"]) -> Float[Array, "*m f"]: ...

    def glu(
        self, x: Float[Array, "*m d"], w_gate: Float[Array, "e d f"], w_up: Float[Array, "e d f"], activation: Activation
    ) -> Float[Array, "*m f"]:
        return activation(self.dot(x, w_gate)) * self.dot(x, w_up)

    def low_rank(self, x: Float[Array, "*m d"], a: Float[Array, "e d r"], b: Float[Array, "e r f"]) -> Float[Array, "*m f"]:
        return self.dot(self.dot(x, a), b)

    def map(self, function: Function, params: Any, x: Float[Array, "*m d"], key: Array | None = None) -> Float[Array, "*m f"]:
        """Whole experts on rows; `function` and the rest are those of `moejax.Experts`."""
        return function(params, x, self) if key is None else function(params, x, self, key)


@struct.dataclass
class Batched(Layout):
    """Rows `x[e, c, d]`: a batch of c rows per expert."""

    def dot(self, x: Float[Array, "e c d"], w: Float[Array, "e d f"]) -> Float[Array, "e c f"]:
        return jnp.einsum("ecd,edf->ecf", x, w.astype(x.dtype))

    def take(self, b: Float[Array, "e f"]) -> Float[Array, "e 1 f"]:
        return b[:, None]


@struct.dataclass
class Grouped(Layout):
    """Rows `x[m, d]` sorted by expert; expert i owns the next `group_sizes[i]` rows, rows past the last are zero."""

    group_sizes: Int[Array, "e"]
    num_rows: int = struct.field(pytree_node=False)
    implementation: str = struct.field(pytree_node=False, default="auto")

    def dot(self, x: Float[Array, "m d"], w: Float[Array, "e d f"]) -> Float[Array, "m f"]:
        return grouped_matmul(x, w.astype(x.dtype), self.group_sizes, self.implementation)

    def take(self, b: Float[Array, "e f"]) -> Float[Array, "m f"]:
        # A grouped matmul of width one rather than a gather, whose derivative would be a slow scatter-add of all rows.
        ones = jnp.ones((self.num_rows, 1), b.dtype)
        return grouped_matmul(ones, b[:, None], self.group_sizes, self.implementation)

    def glu(
        self, x: Float[Array, "m d"], w_gate: Float[Array, "e d f"], w_up: Float[Array, "e d f"], activation: Activation
    ) -> Float[Array, "m f"]:
        w_gate, w_up = (w.astype(x.dtype) for w in (w_gate, w_up))
        return grouped_glu(x, w_gate, w_up, self.group_sizes, activation, self.implementation)

    def low_rank(self, x: Float[Array, "m d"], a: Float[Array, "e d r"], b: Float[Array, "e r f"]) -> Float[Array, "m f"]:
        a, b = (w.astype(x.dtype) for w in (a, b))
        # The operation has every implementation of a grouped matmul but JAX's own, which does it as two of them.
        name = "grouped_matmul" if self.implementation == "ragged_dot" else self.implementation
        return low_rank_grouped_matmul(x, a, b, self.group_sizes, implementation=name)

    def map(self, function: Function, params: Any, x: Float[Array, "m d"], key: Array | None = None) -> Float[Array, "m f"]:
        if key is not None:
            return function(params, x, self, key)  # draws for all rows at once
        if resolve("grouped_matmul", self.implementation, tuple(IMPLEMENTATIONS), AUTO) != "xla":
            return function(params, x, self)

        def one(params: Any, rows: Array) -> Array:
            return function(params, rows[None], Batched())[0]

        return grouped_map(one, params, x, self.group_sizes)


@struct.dataclass
class PerToken(Layout):
    """Rows `x[m, d]` in any order, each with its own copy of its expert's parameters: tiny experts and decoding."""

    expert: Int[Array, "m"]

    def dot(self, x: Float[Array, "m d"], w: Float[Array, "e d f"]) -> Float[Array, "m f"]:
        return jnp.einsum("md,mdf->mf", x, w[self.expert].astype(x.dtype))

    def take(self, b: Float[Array, "e f"]) -> Float[Array, "m f"]:
        return b[self.expert]


@struct.dataclass
class Merged(Layout):
    """Rows `x[g, n, d]`; each group has one expert, the weighted average of all experts' parameters."""

    weight: Float[Array, "g e"]

    def dot(self, x: Float[Array, "g n d"], w: Float[Array, "e d f"]) -> Float[Array, "g n f"]:
        return jnp.einsum("gnd,gdf->gnf", x, jnp.einsum("ge,edf->gdf", self.weight, w).astype(x.dtype))

    def take(self, b: Float[Array, "e f"]) -> Float[Array, "g 1 f"]:
        return jnp.einsum("ge,ef->gf", self.weight, b)[:, None]
