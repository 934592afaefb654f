"""Rank-one experts in plain XLA, in chunks of tokens."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.rank_one.chunks import over_chunks

# Tokens of a chunk. Measured on two x86-64 cores with 16 of 65,536 experts of width 256: 32 to 128 tokens take a third of the time that
# 1,024 tokens at once take, since what a chunk gathers stays in the cache.
CHUNK = 64

_HIGHEST = jax.lax.Precision.HIGHEST


class RowGradients(NamedTuple):
    """Gradients of `rank_one_experts`, with those of the banks as rows.

    Attributes:
      index: the experts that were picked, each once, then e (which is no expert) for what is left of the m rows.
      u: gradient to the rows `u[index]`, float32; zero where `index` is e.
      v: gradient to the rows `v[index]`, float32; zero where `index` is e.
      x: gradient to the tokens, float32.
      weight: gradient to the weights, float32.
    """

    index: Int[Array, "m"]
    u: Float[Array, "m d"]
    v: Float[Array, "m d"]
    x: Float[Array, "n d"]
    weight: Float[Array, "n p"]


def experts(x: Array, index: Array, weight: Array, u: Array, v: Array, activation: Callable[[Array], Array]) -> Array:
    """See the package; float32."""

    def step(carry: None, chunk: tuple[Array, ...]) -> tuple[None, tuple[Array]]:
        x, index, weight = chunk
        hidden = activation(_dot("nd,npd->np", x, _rows(u, index)))
        return carry, (_dot("np,npd->nd", weight.astype(jnp.float32) * hidden, _rows(v, index)),)

    _, (y,) = over_chunks(step, None, (x, index, weight), CHUNK, fill=(0, u.shape[0], 0))
    return y


def gradient(
    x: Float[Array, "n d"],
    index: Int[Array, "n p"],
    weight: Float[Array, "n p"],
    u: Float[Array, "e d"],
    v: Float[Array, "e d"],
    dy: Float[Array, "n d"],
    activation: Callable[[Array], Array],
    slot: Int[Array, "n p"],
    num_slots: int,
) -> tuple[Float[Array, "n d"], Float[Array, "n p"], Float[Array, "m d"], Float[Array, "m d"]]:
    """Gradients to x and weight, and to u and v with that of pick (t, j) in row `slot[t, j]` of `num_slots`; float32."""

    def step(banks: tuple[Array, Array], chunk: tuple[Array, ...]) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        x, index, weight, dy, slot = chunk
        x, weight, dy = (a.astype(jnp.float32) for a in (x, weight, dy))
        u_rows = _rows(u, index)
        hidden, pull_back = jax.vjp(activation, _dot("nd,npd->np", x, u_rows))
        dweighted = _dot("nd,npd->np", dy, _rows(v, index))
        (dpre,) = pull_back(weight * dweighted)
        du, dv = banks
        du = du.at[slot].add(dpre[..., None] * x[:, None], mode="drop")
        dv = dv.at[slot].add((weight * hidden)[..., None] * dy[:, None], mode="drop")
        return (du, dv), (_dot("np,npd->nd", dpre, u_rows), hidden * dweighted)

    empty = jnp.zeros((num_slots, x.shape[1]), jnp.float32)
    fill = (0, u.shape[0], 0, 0, num_slots)
    (du, dv), (dx, dweight) = over_chunks(step, (empty, empty), (x, index, weight, dy, slot), CHUNK, fill)
    return dx, dweight, du, dv


def gradient_rows(
    x: Array, index: Array, weight: Array, u: Array, v: Array, dy: Array, activation: Callable[[Array], Array]
) -> RowGradients:
    """See the package.

    Picks find their rows through a table of experts rather than by sorting: one pass over e integers, where sorting n * p picks takes
    as long as the rest on a CPU.
    """
    e = u.shape[0]
    m = min(index.size, e)
    picked = jnp.zeros(e, jnp.int32).at[index.reshape(-1)].set(1)
    slot = (jnp.cumsum(picked) - 1)[index]
    owner = jnp.full(m, e, index.dtype).at[slot.reshape(-1)].set(index.reshape(-1))
    dx, dweight, du, dv = gradient(x, index, weight, u, v, dy, activation, slot, m)
    return RowGradients(owner, du, dv, dx, dweight)


def _rows(bank: Array, index: Array) -> Float[Array, "n p d"]:
    """Picked rows in float32; zero for the indices that fill up the last chunk."""
    return bank.at[index].get(mode="fill", fill_value=0).astype(jnp.float32)


def _dot(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a.astype(jnp.float32), b, precision=_HIGHEST)
