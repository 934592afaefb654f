"""The block without a mixer."""

import flax.linen as nn
from jaxtyping import Array, Float

from moejax.core.context import Context
from moejax.core.fields import Rate
from moejax.core.layer import RowWise
from moejax.layers.registry import blocks, ffns, norms


@blocks.register("feed_forward", slots={"ffn": ffns, "norm": norms})
class FeedForward(RowWise):
    """A block without a mixer, for between two that have one: x + ffn(norm(x)) (ST-MoE's dense layers beside sparse ones).

    Attributes:
      ffn: any layer of the registry `ffns`.
      norm: None for a layer that takes the tokens as they are (BASE layers).
      dropout: rate on the branch in training; rng stream 'dropout'.
    """

    ffn: nn.Module
    norm: nn.Module | None = None
    dropout: Rate = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"], ctx: Context) -> Float[Array, "b s d"]:
        y = self.ffn(x if self.norm is None else self.norm.copy(name="ffn_norm")(x), ctx)
        return x + nn.Dropout(self.dropout, deterministic=not ctx.train)(y).astype(x.dtype)
