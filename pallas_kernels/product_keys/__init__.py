"""Product-key top-k: the best k of s * s keys, each the sum of two of 2 * s half keys (Lample et al. 2019; PEER, He 2024).

The score of key `i * s + j` is `<query[0], keys[0, i]> + <query[1], keys[1, j]>`, so its best k are sums of the best k of each
half; and of those k * k sums only the pairs with (rank + 1) * (rank' + 1) <= k can be among the best: k log k rather than k * k.

Contract, for every implementation: scores are float32 products of float32 accuracy, also for bfloat16 queries; they come in
falling order; the choice is exact. Equal scores go to the lowest index, except that among sums which are equal only because they
were rounded any may win.

The derivative gathers the k picked keys and scatters into their rows, in chunks of tokens: nothing of size s * s, nor of size s per
token.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.implementations import resolve
from pallas_kernels.product_keys import gpu, tpu, xla

AUTO = {"cpu": ("xla",), "tpu": ("tpu", "xla"), "gpu": ("gpu", "xla")}


def product_key_top_k(
    query: Float[Array, "n h 2 dk"], keys: Float[Array, "h 2 s dk"], k: int, implementation: str = "auto"
) -> tuple[Float[Array, "n h k"], Int[Array, "n h k"]]:
    """Scores and indices of the k best of the s * s product keys, for each token and head.

    Args:
      query: both halves of each head's query.
      keys: both sets of half keys of each head.
      k: how many, at most s * s.
      implementation: 'auto' picks by platform; a name runs that one or raises.

    Returns:
      Scores, in falling order, and indices `i * s + j`. Gradients flow from the scores to query and keys.

    Raises:
      ValueError: unknown implementation, k outside 1..s*s, indices beyond int32, or a size that the named implementation
        cannot do.
    """
    s = keys.shape[2]
    if not 1 <= k <= s * s:
        raise ValueError(f"k={k} of product_key_top_k must be between 1 and the number of keys, {s}*{s}")
    if s * s > jnp.iinfo(jnp.int32).max:
        raise ValueError(f"s={s} half keys of product_key_top_k make more keys than int32 can count; the most is 46340")
    limits = {"tpu": tpu.refuses, "interpret_tpu": tpu.refuses, "gpu": gpu.refuses, "interpret_gpu": gpu.refuses}

    def refuses(name: str) -> str | None:
        return limits[name](k, s, query.shape[3]) if name in limits else None

    name = resolve("product_key_top_k", implementation, tuple(IMPLEMENTATIONS), AUTO, refuses)
    return _top_k(query, keys, k, name)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _top_k(query: Array, keys: Array, k: int, name: str) -> tuple[Array, Array]:
    return IMPLEMENTATIONS[name](query, keys, k)


def _fwd(query: Array, keys: Array, k: int, name: str) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    score, index = _top_k(query, keys, k, name)
    return (score, index), (query, keys, index)


def _bwd(k: int, name: str, residuals: tuple[Array, ...], cotangents: tuple[Array, Any]) -> tuple[Array, Array]:
    query, keys, index = residuals
    dquery, dkeys = xla.gradient(query, keys, index, cotangents[0])
    return dquery.astype(query.dtype), dkeys.astype(keys.dtype)


_top_k.defvjp(_fwd, _bwd)


def _reference(query: Array, keys: Array, k: int) -> tuple[Array, Array]:
    halves = xla.half_scores(query, keys)
    score, index = jax.lax.top_k((halves[:, :, 0, :, None] + halves[:, :, 1, None, :]).reshape(*query.shape[:2], -1), k)
    return score, index.astype(jnp.int32)


IMPLEMENTATIONS: dict[str, Callable[[Array, Array, int], tuple[Array, Array]]] = {
    "reference": _reference,
    "xla": xla.top_k,
    "tpu": tpu.top_k,
    "gpu": gpu.top_k,
    "interpret_tpu": partial(tpu.top_k, interpret=True),
    "interpret_gpu": partial(gpu.top_k, interpret=True),
}

__all__ = ["AUTO", "IMPLEMENTATIONS", "product_key_top_k"]
