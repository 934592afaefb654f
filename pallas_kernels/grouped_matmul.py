"""Grouped matmul: rows sorted by group, each group times its own matrix.

Contract, for every implementation: rows past the last group are zero, empty groups get zero gradients, any sizes of m, d and f.

Implementations:
  reference   one masked dense product per group: the definition.
  xla         a loop over groups and, inside, over tiles of a group's rows; the trip count follows the group sizes, so the cost is
              that of the rows that are there. Its derivative is again two such loops: the transpose that JAX would derive
              adds a full zero array of the weights per tile. The choice on CPU.
  ragged_dot  `jax.lax.ragged_dot`; has kernels on TPU and GPU, and on CPU is a masked dense product over all groups.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

IMPLEMENTATIONS: tuple[str, ...] = ("reference", "xla", "ragged_dot")


def grouped_matmul(
    x: Float[Array, "m d"],
    w: Float[Array, "e d f"],
    group_sizes: Int[Array, "e"],
    implementation: str = "auto",
) -> Float[Array, "m f"]:
    """`y[r] = x[r] @ w[group of r]` where group i owns the next `group_sizes[i]` rows; rows past the last group give zero.

    Args:
      x: rows sorted by group.
      w: one matrix per group.
      group_sizes: rows of each group; their sum is at most m.
      implementation: 'auto' picks by platform; a name runs that one or raises.

    Raises:
      ValueError: unknown implementation.
    """
    name = choose_implementation() if implementation == "auto" else implementation
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation='{name}' of grouped_matmul is unknown; valid names: auto, {', '.join(IMPLEMENTATIONS)}"
        )
    if name == "reference":
        return _reference(x, w, group_sizes)
    if name == "ragged_dot":
        return _zero_tail(jax.lax.ragged_dot(x, w, group_sizes), group_sizes)
    return _xla(x, w, group_sizes)


def choose_implementation(platform: str | None = None) -> str:
    """What 'auto' means on `platform` (the default backend's by default)."""
    return "xla" if (platform or jax.default_backend()) == "cpu" else "ragged_dot"


def group_of_row(group_sizes: Int[Array, "e"], m: int) -> Int[Array, "m"]:
    """Each row's group; e for rows past the last group."""
    return jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(m), side="right").astype(jnp.int32)


def _reference(x: Float[Array, "m d"], w: Float[Array, "e d f"], group_sizes: Int[Array, "e"]) -> Float[Array, "m f"]:
    member = jax.nn.one_hot(group_of_row(group_sizes, x.shape[0]), w.shape[0], dtype=x.dtype)
    return jnp.einsum("me,md,edf->mf", member, x, w, precision=jax.lax.Precision.HIGHEST)


def _zero_tail(y: Float[Array, "m f"], group_sizes: Int[Array, "e"]) -> Float[Array, "m f"]:
    return jnp.where((jnp.arange(y.shape[0]) < group_sizes.sum())[:, None], y, 0)


@jax.custom_vjp
def _xla(x: Float[Array, "m d"], w: Float[Array, "e d f"], group_sizes: Int[Array, "e"]) -> Float[Array, "m f"]:
    return _zero_tail(_loop(x, w, group_sizes, transpose=False), group_sizes)


def _xla_fwd(x: Array, w: Array, group_sizes: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return _xla(x, w, group_sizes), (x, w, group_sizes)


def _xla_bwd(residuals: tuple[Array, Array, Array], dy: Array) -> tuple[Array, Array, None]:
    x, w, group_sizes = residuals
    dx = _zero_tail(_loop(dy, w, group_sizes, transpose=True), group_sizes)
    return dx, _weight_gradient(x, dy, group_sizes).astype(w.dtype), None


_xla.defvjp(_xla_fwd, _xla_bwd)


def tile_rows(m: int, e: int) -> int:
    """Rows of a tile: about a group's mean size, so that few tiles are ragged, within what a matmul needs to run well."""
    return min(128, max(8, 1 << (max(m // max(e, 1), 1) - 1).bit_length()))


@partial(jax.jit, static_argnames="transpose")
def _loop(x: Array, w: Array, group_sizes: Array, transpose: bool) -> Array:
    """`x[rows of i] @ w[i]` (or `w[i].T`) group after group. Rows past the last group are left undefined.

    A group's last tile may reach into the next group's rows; those are overwritten when that group's turn comes, which is why
    groups are visited in order and why nothing is padded or masked inside the loop.
    """
    tile = tile_rows(x.shape[0], w.shape[0])
    d, f = (w.shape[2], w.shape[1]) if transpose else (w.shape[1], w.shape[2])
    padded = jnp.pad(x, ((0, tile), (0, 0)))
    contract = (((1,), (1 if transpose else 0,)), ((), ()))

    def group(y: Array, group: tuple[Array, Array, Array]) -> tuple[Array, None]:
        matrix, start, size = group

        def step(t: Array, y: Array) -> Array:
            rows = jax.lax.dynamic_slice(padded, (start + t * tile, 0), (tile, d))
            return jax.lax.dynamic_update_slice(y, jax.lax.dot_general(rows, matrix, contract), (start + t * tile, 0))

        return jax.lax.fori_loop(0, (size + tile - 1) // tile, step, y), None

    starts = jnp.cumsum(group_sizes) - group_sizes
    y = jnp.zeros((x.shape[0] + tile, f), x.dtype)
    y, _ = jax.lax.scan(group, y, (w, starts, group_sizes))
    return y[: x.shape[0]]


@jax.jit
def _weight_gradient(x: Array, dy: Array, group_sizes: Array) -> Array:
    """`dw[i] = x[rows of i].T @ dy[rows of i]`; zero for empty groups. Accumulates in float32."""
    tile = tile_rows(x.shape[0], group_sizes.shape[0])
    d, f = x.shape[1], dy.shape[1]
    x_padded, dy_padded = (jnp.pad(a, ((0, tile), (0, 0))) for a in (x, dy))

    def group(_: None, group: tuple[Array, Array]) -> tuple[None, Array]:
        start, size = group

        def step(t: Array, dw: Array) -> Array:
            rows = jax.lax.dynamic_slice(x_padded, (start + t * tile, 0), (tile, d))
            grads = jax.lax.dynamic_slice(dy_padded, (start + t * tile, 0), (tile, f))
            inside = (jnp.arange(tile) < size - t * tile)[:, None]
            return dw + jax.lax.dot_general(
                jnp.where(inside, rows, 0), grads, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
            )

        dw = jax.lax.fori_loop(0, (size + tile - 1) // tile, step, jnp.zeros((d, f), jnp.float32))
        return None, dw

    starts = jnp.cumsum(group_sizes) - group_sizes
    _, dw = jax.lax.scan(group, None, (starts, group_sizes))
    return dw
