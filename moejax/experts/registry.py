"""The registry of banks and the activations they name."""

from collections.abc import Callable

import jax
from jaxtyping import Array

from moejax.errors import ConfigError, nearest
from moejax.registry import Registry

banks = Registry("bank")

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "squared_relu": lambda x: jax.numpy.square(jax.nn.relu(x)),
    "tanh": jax.numpy.tanh,
    "identity": lambda x: x,
}


def activation(name: str) -> Callable[[Array], Array]:
    """The activation called `name`. Raises ConfigError for an unknown one."""
    if name not in ACTIVATIONS:
        raise ConfigError(f"activation='{name}' is unknown{nearest(name, ACTIVATIONS)}")
    return ACTIVATIONS[name]
