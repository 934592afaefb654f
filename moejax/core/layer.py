"""What a model asks of every part that it is made of, and what a part that says nothing answers: no.

A layer that mixes tokens, and forgets to say so, would leak the future into a decoder and be decoded wrongly from a cache. So
silence is refused: a part that treats each token by itself derives from `RowWise`, any other one from `Layer` and answers.

    class Mean(Layer):                                   # averages over its sequence and says nothing: refused in a decoder
        @nn.compact
        def __call__(self, x, ctx): return jnp.broadcast_to(x.mean(1, keepdims=True), x.shape)
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn

from moejax.core.errors import ConfigError


class Layer(nn.Module):
    """A part of a model: `layer(x[b, s, d], ctx) -> y[b, s, o]`. A model asks it the questions below before it runs it.

    Attributes:
      counts_padding: the layer divides a sequence by its places, padding included: into segments, or into shares of its length. No
        other layer may count what is no token.
    """

    counts_padding: ClassVar[bool] = False

    def check_causal(self, where: str) -> None:
        """Raises ConfigError if a token's output may depend on later tokens of its sequence; `where` is the part's place.

        Parts that this one holds are asked themselves.
        """
        raise ConfigError(
            f"{where} ({type(self).__name__}) does not say whether its tokens see later ones, which a decoder must know; write its "
            "check_causal(where), or derive it from moejax.RowWise if it treats each token by itself"
        )

    def decodable(self) -> str | None:
        """None if decoding one token at a time with a cache gives what a whole forward pass gives; else the reason why not."""
        return f"{type(self).__name__} does not say whether it can be decoded token by token; write its decodable()"

    def active_fraction(self) -> float:
        """Share of the parameters of its 'bank' that a token uses, on average at most; for counting active parameters."""
        return 1.0

    def carries(self, b: int, s: int) -> Mapping[str, Any]:
        """What travels beside the tokens from layer to layer: name -> the value `[b, s, ...]` before the first one."""
        return {}

    def shares(self, width: int) -> Mapping[str, Any]:
        """Parameters that all layers of a stack share: name -> {parameter: (initialiser, shape, logical axis names)}."""
        return {}


class RowWise(Layer):
    """A part whose output for a token depends on that token alone (and on its parameters): causal, and decodable."""

    def check_causal(self, where: str) -> None:
        """Never refuses: no token sees another one."""

    def decodable(self) -> str | None:
        """Always: a token needs no other one."""
        return None
