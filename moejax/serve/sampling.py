"""How the next token is drawn from its logits. Samplers are hashable values, so that decoding compiles once for each."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from moejax.core.errors import ConfigError

# `sampler(logits, key) -> token`; hashable.
Sampler = Callable[[Float[Array, "b v"], Key[Array, ""]], Int[Array, "b"]]


@dataclasses.dataclass(frozen=True)
class Greedy:
    """The most likely token; ties go to the lowest id."""

    def __call__(self, logits: Float[Array, "b v"], key: Key[Array, ""]) -> Int[Array, "b"]:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Temperature:
    """A token drawn from softmax(logits / temperature), cut off at the tail first.

    Attributes:
      temperature: above 0; below 1 sharpens.
      top_k: only the k most likely tokens (Fan et al. 2018). None means all.
      top_p: only the smallest set of most likely tokens whose probability, after the temperature, reaches p (Holtzman et
        al. 2020). None means all. With `top_k`, both limits hold.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        if self.temperature <= 0:
            raise ConfigError(f"temperature={self.temperature} must be above 0; use Greedy() for the most likely token")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k} must be at least 1; None turns it off")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} must lie in (0, 1]; None turns it off")

    def __call__(self, logits: Float[Array, "b v"], key: Key[Array, ""]) -> Int[Array, "b"]:
        ordered, token = jax.lax.top_k(logits.astype(jnp.float32) / self.temperature, logits.shape[-1])
        keep = jnp.ones(ordered.shape, bool)
        if self.top_k is not None:
            keep &= jnp.arange(ordered.shape[-1]) < self.top_k
        if self.top_p is not None:
            probability = jax.nn.softmax(ordered, axis=-1)
            before = jnp.cumsum(probability, axis=-1) - probability
            keep &= before < self.top_p  # the first token is always kept: nothing comes before it
        choice = jax.random.categorical(key, jnp.where(keep, ordered, -jnp.inf), axis=-1)
        return jnp.take_along_axis(token, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)
