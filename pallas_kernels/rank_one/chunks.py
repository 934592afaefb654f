"""Scanning over tokens in chunks, so that what a chunk needs is the most that exists at a time."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

Carry = TypeVar("Carry")


def over_chunks(
    step: Callable[[Carry, tuple[Array, ...]], tuple[Carry, tuple[Array, ...]]],
    carry: Carry,
    tokens: tuple[Array, ...],
    size: int,
    fill: tuple[int, ...] | None = None,
) -> tuple[Carry, tuple[Array, ...]]:
    """`jax.lax.scan(step, carry, chunks)` over chunks of arrays that all lead with tokens.

    Args:
      step: from carry and a chunk[size, ...] of each array, the next carry and outputs[size, ...].
      carry: at the start.
      tokens: arrays [n, ...].
      size: tokens of a chunk.
      fill: what fills up the last chunk, for each array; zeros by default. Its outputs are cut off.

    Returns:
      The last carry, and the outputs [n, ...].
    """
    n = tokens[0].shape[0]
    size = max(1, min(size, n))
    chunks = -(-n // size)

    def cut(a: Array, value: int) -> Array:
        a = jnp.pad(a, ((0, chunks * size - n), *[(0, 0)] * (a.ndim - 1)), constant_values=value)
        return a.reshape(chunks, size, *a.shape[1:])

    carry, outputs = jax.lax.scan(step, carry, tuple(map(cut, tokens, fill or (0,) * len(tokens))))
    return carry, tuple(a.reshape(chunks * size, *a.shape[2:])[:n] for a in outputs)
