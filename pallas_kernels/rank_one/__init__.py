"""Rank-one experts (PEER, He 2024): each is one hidden unit, and each token picks its own p of them out of very many.

    y[t] = sum_j weight[t, j] * activation(<x[t], u[index[t, j]]>) * v[index[t, j]]

Contract, for every implementation: indices lie in 0..e-1 and may repeat within a token; sums and derivatives are float32 and come back
in the dtype of what they belong to; rows of u and v that nobody picked get zero gradients and are never read.

`xla` works on chunks of tokens, forward and backward, so that gathered rows `[tokens, p, d]` exist for a chunk only. The backward pass
keeps no hidden state: it gathers again what it needs, each row once. The dense gradient `[e, d]` of a bank is one array into which
picks are added.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.implementations import resolve
from pallas_kernels.rank_one import gpu, tpu, xla

AUTO = {"cpu": ("xla",), "tpu": ("tpu", "xla"), "gpu": ("gpu", "xla")}
Activation = Callable[[Array], Array]


def rank_one_experts(
    x: Float[Array, "n d"],
    index: Int[Array, "n p"],
    weight: Float[Array, "n p"],
    u: Float[Array, "e d"],
    v: Float[Array, "e d"],
    activation: Activation,
    implementation: str = "auto",
) -> Float[Array, "n d"]:
    """Weighted sum of each token's picked rank-one experts.

    Args:
      x: tokens.
      index: picked experts.
      weight: of each pick.
      u: input vectors of the experts.
      v: output vectors of the experts.
      activation: elementwise, static: the same function object each time, or the program is compiled anew.
      implementation: 'auto' picks by platform; a name runs that one or raises.

    Returns:
      Outputs in x's dtype. Gradients flow to x, weight, u and v.

    Raises:
      ValueError: unknown implementation, or one that cannot do these sizes or dtypes.
    """
    refusals = {"tpu": tpu.refuses, "interpret_tpu": tpu.refuses, "gpu": gpu.refuses, "interpret_gpu": gpu.refuses}
    name = resolve(
        "rank_one_experts",
        implementation,
        tuple(IMPLEMENTATIONS),
        AUTO,
        lambda name: refusals[name](index, u, v) if name in refusals else None,
    )
    return _experts(x, index, weight, u, v, activation, name)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _experts(x: Array, index: Array, weight: Array, u: Array, v: Array, activation: Activation, name: str) -> Array:
    return IMPLEMENTATIONS[name](x, index, weight, u, v, activation).astype(x.dtype)


def _fwd(
    x: Array, index: Array, weight: Array, u: Array, v: Array, activation: Activation, name: str
) -> tuple[Array, tuple[Array, ...]]:
    return _experts(x, index, weight, u, v, activation, name), (x, index, weight, u, v)


def _bwd(activation: Activation, name: str, residuals: tuple[Array, ...], dy: Array) -> tuple[Array, None, Array, Array, Array]:
    x, index, weight, u, v = residuals
    dx, dweight, du, dv = xla.gradient(x, index, weight, u, v, dy, activation)
    return dx.astype(x.dtype), None, dweight.astype(weight.dtype), du.astype(u.dtype), dv.astype(v.dtype)


_experts.defvjp(_fwd, _bwd)


def _reference(x: Array, index: Array, weight: Array, u: Array, v: Array, activation: Activation) -> Array:
    x, weight, u, v = (a.astype(jnp.float32) for a in (x, weight, u, v))
    hidden = activation(jnp.einsum("nd,npd->np", x, u[index], precision="highest"))
    return jnp.einsum("np,npd->nd", weight * hidden, v[index], precision="highest")


IMPLEMENTATIONS: dict[str, Callable[[Array, Array, Array, Array, Array, Activation], Array]] = {
    "reference": _reference,
    "xla": xla.experts,
    "tpu": tpu.experts,
    "gpu": gpu.experts,
    "interpret_tpu": partial(tpu.experts, interpret=True),
    "interpret_gpu": partial(gpu.experts, interpret=True),
}

__all__ = ["AUTO", "IMPLEMENTATIONS", "rank_one_experts"]
