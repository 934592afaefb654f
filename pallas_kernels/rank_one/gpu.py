"""Rank-one experts on GPU, forward: a Triton program per token reads the rows that the token picked, and nothing is written but y."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

MAX_WIDTH = 4096
# Elements of a bank that a program holds at a time: 64 registers of each of 128 threads.
TILE = 8192


def refuses(index: Array, u: Array, v: Array) -> str | None:
    """Why the kernel cannot run, or None."""
    d = u.shape[1]
    return f"experts of width {d}; a row must fit in registers, which it does up to {MAX_WIDTH}" if d > MAX_WIDTH else None


def experts(
    x: Array, index: Array, weight: Array, u: Array, v: Array, activation: Callable[[Array], Array], interpret: bool = False
) -> Array:
    """See the package; float32."""
    (n, d), p = x.shape, index.shape[1]
    picks = min(pl.next_power_of_2(p), max(TILE // pl.next_power_of_2(d), 1))
    return pl.pallas_call(
        partial(_kernel, activation=activation, picks=picks),
        grid=(n,),
        out_shape=jax.ShapeDtypeStruct((n, d), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        cost_estimate=pl.CostEstimate(
            flops=4 * n * p * d, transcendentals=n * p, bytes_accessed=n * p * d * (u.itemsize + v.itemsize) + 8 * n * (d + p)
        ),
        interpret=interpret,
        name="rank_one_experts",
    )(x, index.astype(jnp.int32), weight, u, v)


def _kernel(
    x_ref: Any,
    index_ref: Any,
    weight_ref: Any,
    u_ref: Any,
    v_ref: Any,
    y_ref: Any,
    *,
    activation: Callable[[Array], Array],
    picks: int,
) -> None:
    d, p = u_ref.shape[1], index_ref.shape[1]
    width = pl.next_power_of_2(d)
    token, column = pl.program_id(0), jnp.arange(width)
    there = column < d
    x = plgpu.load(x_ref.at[jnp.full_like(column, token), column], mask=there, other=0).astype(jnp.float32)

    def step(i: Array, y: Array) -> Array:
        pick = i * picks + jnp.arange(picks)
        inside, own = pick < p, jnp.full_like(pick, token)
        index = plgpu.load(index_ref.at[own, pick], mask=inside, other=0)
        weight = plgpu.load(weight_ref.at[own, pick], mask=inside, other=0).astype(jnp.float32)

        def rows(bank: Any) -> Array:
            mask = inside[:, None] & there
            return plgpu.load(bank.at[index[:, None], column[None]], mask=mask, other=0).astype(jnp.float32)

        scale = weight * activation(jnp.sum(x * rows(u_ref), axis=1))
        return y + jnp.sum(scale[:, None] * rows(v_ref), axis=0)

    y = jax.lax.fori_loop(0, pl.cdiv(p, picks), step, jnp.zeros(width, jnp.float32))
    plgpu.store(y_ref.at[jnp.full_like(column, token), column], y, mask=there)
