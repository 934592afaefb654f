"""The block of the first transformers and of BERT, whose norms come after the residual sums."""

import flax.linen as nn
from jaxtyping import Array, Float

from moejax.core.context import Context
from moejax.core.fields import Rate
from moejax.core.layer import RowWise
from moejax.layers.registry import blocks, ffns, mixers, norms


@blocks.register("post_norm", slots={"mixer": mixers, "ffn": ffns, "norm": norms})
class PostNorm(RowWise):
    """The post-norm block: norm(x + mixer(x)), then norm(x + ffn(x)) (Vaswani et al. 2017; BERT, Devlin et al. 2019).

    Attributes:
      mixer, ffn, norm, dropout: as in `Transformer`.
    """

    mixer: nn.Module
    ffn: nn.Module
    norm: nn.Module
    dropout: Rate = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"], ctx: Context) -> Float[Array, "b s d"]:
        drop = nn.Dropout(self.dropout, deterministic=not ctx.train)
        x = self.norm.copy(name="mixer_norm")(x + drop(self.mixer(x, ctx)).astype(x.dtype))
        return self.norm.copy(name="ffn_norm")(x + drop(self.ffn(x, ctx)).astype(x.dtype))
