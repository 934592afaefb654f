"""Blocks: what a model repeats. `block(x[b, s, d], ctx) -> x[b, s, d]`, residuals inside."""

import flax.linen as nn
from jaxtyping import Array, Float

from moejax.core.context import Context
from moejax.core.fields import Rate
from moejax.core.layer import RowWise
from moejax.layers.registry import blocks, ffns, mixers, norms


@blocks.register("transformer", slots={"mixer": mixers, "ffn": ffns, "norm": norms})
class Transformer(RowWise):
    """The pre-norm block: x + mixer(norm(x)), then x + ffn(norm(x)) (Xiong et al. 2020).

    Attributes:
      mixer: exchanges information between tokens (kind 'attention', ...).
      ffn: acts on each token, or routes it: any layer of the registry `ffns`.
      norm: made twice, as 'mixer_norm' and 'ffn_norm', with separate parameters.
      dropout: rate on both branches in training; rng stream 'dropout'.
    """

    mixer: nn.Module
    ffn: nn.Module
    norm: nn.Module
    dropout: Rate = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"], ctx: Context) -> Float[Array, "b s d"]:
        drop = nn.Dropout(self.dropout, deterministic=not ctx.train)
        y = self.mixer(self.norm.copy(name="mixer_norm")(x), ctx)
        x = x + drop(y).astype(x.dtype)
        y = self.ffn(self.norm.copy(name="ffn_norm")(x), ctx)
        return x + drop(y).astype(x.dtype)
