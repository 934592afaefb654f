"""Layouts: how the rows of a bank's experts lie in memory.

A bank is written once against two operations and never learns the layout:

    layout.dot(x, w)   every row times its own expert's matrix `w[e, d, f]`
    layout.take(b)     every row's own expert's vector `b[e, f]`, broadcastable against the rows

so that each dispatch backend serves every kind of expert. Parameters are cast to the rows' dtype (bfloat16 compute on float32
parameters). `layout.tied(slots, num_stored)` maps the plan's experts to stored ones, for banks in which several slots share parameters.
"""

from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_matmul import grouped_matmul


@runtime_checkable
class Layout(Protocol):
    """See the module's docstring; `*m` are the row axes of the layout."""

    def dot(self, x: Float[Array, "*m d"], w: Float[Array, "e d f"]) -> Float[Array, "*m f"]: ...

    def take(self, b: Float[Array, "e f"]) -> Float[Array, "*m f"]: ...

    def tied(self, slots: Int[Array, "e"], num_stored: int) -> "Layout": ...


@struct.dataclass
class Batched:
    """Rows `x[e, c, d]`: a batch of c rows per expert. `slots[e]` picks stored parameters when some are shared."""

    slots: Int[Array, "e"] | None = None

    def dot(self, x: Float[Array, "e c d"], w: Float[Array, "e0 d f"]) -> Float[Array, "e c f"]:
        return jnp.einsum("ecd,edf->ecf", x, self._pick(w).astype(x.dtype))

    def take(self, b: Float[Array, "e0 f"]) -> Float[Array, "e 1 f"]:
        return self._pick(b)[:, None]

    def tied(self, slots: Int[Array, "e"], num_stored: int) -> "Batched":
        return Batched(slots if self.slots is None else slots[self.slots])

    def _pick(self, values: Array) -> Array:
        return values if self.slots is None else values[self.slots]


@struct.dataclass
class Grouped:
    """Rows `x[m, d]` sorted by expert; expert i owns the next `group_sizes[i]` rows, rows past the last are zero."""

    group_sizes: Int[Array, "e"]
    num_rows: int = struct.field(pytree_node=False)
    slots: Int[Array, "e"] | None = None
    implementation: str = struct.field(pytree_node=False, default="auto")

    def dot(self, x: Float[Array, "m d"], w: Float[Array, "e0 d f"]) -> Float[Array, "m f"]:
        return grouped_matmul(x, self._pick(w).astype(x.dtype), self.group_sizes, self.implementation)

    def take(self, b: Float[Array, "e0 f"]) -> Float[Array, "m f"]:
        # A grouped matmul of width one rather than a gather, whose derivative would be a slow scatter-add of all rows.
        ones = jnp.ones((self.num_rows, 1), b.dtype)
        return grouped_matmul(ones, self._pick(b)[:, None], self.group_sizes, self.implementation)

    def tied(self, slots: Int[Array, "e"], num_stored: int) -> "Grouped":
        return self.replace(slots=slots if self.slots is None else slots[self.slots])

    def _pick(self, values: Array) -> Array:
        return values if self.slots is None else values[self.slots]


@struct.dataclass
class PerToken:
    """Rows `x[m, d]` in any order, each with its own copy of its expert's parameters: tiny experts and decoding."""

    expert: Int[Array, "m"]

    def dot(self, x: Float[Array, "m d"], w: Float[Array, "e d f"]) -> Float[Array, "m f"]:
        return jnp.einsum("md,mdf->mf", x, w[self.expert].astype(x.dtype))

    def take(self, b: Float[Array, "e f"]) -> Float[Array, "m f"]:
        return b[self.expert]

    def tied(self, slots: Int[Array, "e"], num_stored: int) -> "PerToken":
        return PerToken(slots[self.expert])


@struct.dataclass
class Merged:
    """Rows `x[g, n, d]`; each group has one expert, the weighted average of all experts' parameters."""

    weight: Float[Array, "g e"]

    def dot(self, x: Float[Array, "g n d"], w: Float[Array, "e d f"]) -> Float[Array, "g n f"]:
        return jnp.einsum("gnd,gdf->gnf", x, jnp.einsum("ge,edf->gdf", self.weight, w).astype(x.dtype))

    def take(self, b: Float[Array, "e f"]) -> Float[Array, "g 1 f"]:
        return jnp.einsum("ge,ef->gf", self.weight, b)[:, None]

    def tied(self, slots: Int[Array, "e"], num_stored: int) -> "Merged":
        return Merged(jnp.zeros((self.weight.shape[0], num_stored), self.weight.dtype).at[:, slots].add(self.weight))
