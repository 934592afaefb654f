"""Layers written out in NumPy, and parameters drawn for them without compiling an initialisation."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


def draw(layer: nn.Module, *args: Any, seed: int = 0) -> dict[str, Any]:
    """Variables of `layer` with every parameter away from its start: none is zero, so that none can be ignored unnoticed."""
    shapes = jax.eval_shape(lambda key: layer.init(key, *args), jax.random.key(0))["params"]
    rng = np.random.default_rng(seed)

    def leaf(shape: jax.ShapeDtypeStruct) -> jax.Array:
        fan_in = shape.shape[-2] if len(shape.shape) > 1 else 4
        return jnp.asarray(rng.normal(size=shape.shape) * 1.5 / np.sqrt(fan_in), shape.dtype)

    return {"params": jax.tree.map(leaf, shapes)}


@functools.cache
def compiled(layer: nn.Module, *mutable: str) -> Callable[..., Any]:
    """`layer.apply`, jitted once for all tests of a file."""
    return jax.jit(functools.partial(layer.apply, mutable=list(mutable) or False))


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def glu(params: Mapping[str, Any], expert: int, x: np.ndarray) -> np.ndarray:
    """One gated expert on rows or on one token."""
    gate, up, out = (np.asarray(params[name], np.float64)[expert] for name in ("w_gate", "w_up", "w_out"))
    return (silu(x @ gate) * (x @ up)) @ out


def weighted_experts(params: Mapping[str, Any], combine: np.ndarray, x: np.ndarray) -> np.ndarray:
    """`sum_e combine[t, e] expert_e(x[t])` of one group."""
    return sum(combine[:, [e]] * glu(params, e, x) for e in range(combine.shape[1]))


def close(actual: Any, expected: Any, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    """Trees of arrays agree."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), actual, expected)
