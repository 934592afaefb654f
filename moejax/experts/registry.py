"""The registry of banks and the activations they name."""

from collections.abc import Callable
from typing import Literal, TypeAlias

import flax.linen as nn
import jax
from jaxtyping import Array

from moejax.core.context import Context
from moejax.core.errors import ConfigError, nearest
from moejax.core.params import Initializer, param
from moejax.core.registry import Registry

banks = Registry("bank", "moejax.experts")

Axes = tuple[str | None, ...]


def gelu_exact(x: Array) -> Array:
    """`x * Phi(x)` with the error function."""
    return jax.nn.gelu(x, approximate=False)


# 'gelu' is the tanh form of GPT-2 and BERT's first code, JAX's default; 'gelu_exact' is the error function's, PyTorch's default.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "gelu_exact": gelu_exact,
    "silu": jax.nn.silu,
    "squared_relu": lambda x: jax.numpy.square(jax.nn.relu(x)),
    "tanh": jax.numpy.tanh,
    "identity": lambda x: x,
}

Activation: TypeAlias = Literal[*ACTIVATIONS]


def declare(
    module: nn.Module, parameters: dict[str, tuple[Initializer, tuple[int, ...], Axes]]
) -> tuple[dict[str, Array], dict[str, Axes]]:
    """Declares a bank's parameters, each by initializer, shape and logical axis names; gives them and their axes, for `Experts`."""
    values = {name: param(module, name, *declared) for name, declared in parameters.items()}
    return values, {name: axes for name, (_, _, axes) in parameters.items()}


def dropout(x: Array, rate: float, key: Array) -> Array:
    """Inverted dropout: zero with probability `rate`, scaled up otherwise."""
    return jax.numpy.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)


def dropout_key(bank: nn.Module, rate: float, ctx: Context | None) -> Array | None:
    """A key in training, if there is anything to drop."""
    return bank.make_rng("dropout") if rate and ctx is not None and ctx.train else None


def activation(name: str) -> Callable[[Array], Array]:
    """The activation called `name`. Raises ConfigError for an unknown one."""
    if name not in ACTIVATIONS:
        raise ConfigError(f"activation='{name}' is unknown{nearest(name, ACTIVATIONS)}")
    return ACTIVATIONS[name]
