"""Moving tokens into expert order and back, with the weights of the plan folded in.

Row r of the sorted list holds choice `order[r]` of the flat token-major list (choice i belongs to token i // k), and `inverse` is
the inverse permutation. Because both directions are known, neither the forward nor the backward pass ever scatters: a gather's
derivative here is a gather by the inverse, which CPU, GPU and TPU all do faster than scatter-add.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def permute(x: Float[Array, "n d"], order: Int[Array, "m"], inverse: Int[Array, "m"], k: int) -> Float[Array, "m d"]:
    """`rows[r] = x[order[r] // k]`, with m = n * k."""
    return x[order // k]


def _permute_fwd(x: Array, order: Array, inverse: Array, k: int) -> tuple[Array, Array]:
    return permute(x, order, inverse, k), inverse


def _permute_bwd(k: int, inverse: Array, drows: Array) -> tuple[Array, None, None]:
    return drows[inverse].reshape(-1, k, drows.shape[-1]).sum(1), None, None


permute.defvjp(_permute_fwd, _permute_bwd)


@jax.custom_vjp
def unpermute(
    rows: Float[Array, "m d"], weight: Float[Array, "n k"], order: Int[Array, "m"], inverse: Int[Array, "m"]
) -> Float[Array, "n d"]:
    """`y[t] = sum_j weight[t, j] * rows[inverse[t * k + j]]`: outputs back in token order, weighted and summed over choices."""
    n, k = weight.shape
    return jnp.einsum("nk,nkd->nd", weight.astype(rows.dtype), rows[inverse].reshape(n, k, -1))


def _unpermute_fwd(rows: Array, weight: Array, order: Array, inverse: Array) -> tuple[Array, tuple[Array, ...]]:
    return unpermute(rows, weight, order, inverse), (rows, weight, order, inverse)


def _unpermute_bwd(residuals: tuple[Array, ...], dy: Array) -> tuple[Array, Array, None, None]:
    rows, weight, order, inverse = residuals
    n, k = weight.shape
    drows = weight.reshape(-1)[order].astype(dy.dtype)[:, None] * dy[order // k]
    dweight = jnp.einsum("nd,nkd->nk", dy, rows[inverse].reshape(n, k, -1), preferred_element_type=weight.dtype)
    return drows, dweight, None, None


unpermute.defvjp(_unpermute_fwd, _unpermute_bwd)
