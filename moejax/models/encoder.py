"""The bidirectional text encoder: BERT and its kin, from which sentence embeddings are made."""

from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.core.fields import Count, DType, Few, NonNegative
from moejax.core.params import Dense, param
from moejax.core.sowing import sow
from moejax.layers.registry import norms
from moejax.models.parts import NamedBlock
from moejax.models.registry import models
from moejax.models.stack import Remat, Stack, block_table, pattern_blocks
from moejax.parallel import constrain


@models.register("encoder", slots={"blocks": block_table(causal=False, rope_base=None), "norm": norms})
class Encoder(nn.Module):
    """Tokens, positions and kinds of text, embedded and normalised; a stack of blocks that see both ways (Devlin et al. 2019).

    Gives a vector for each token. Their mean over the valid tokens (`mean_of_tokens`) is what sentence encoders give.

    Attributes:
      vocab_size, d_model, num_layers, pattern, blocks, scan, remat, dtype: as in the decoder.
      max_length: rows of the position table.
      token_types: kinds of text that a token may belong to, the first or second sentence of a pair, say.
      norm: of the embeddings; 'layer_norm' if left out.
      pooler: also sows `tanh(x_0 W + b)` of the first token, as 'vector' into the collection 'pooled'.
      embed_std: standard deviation of the embeddings at the start.
    """

    reads: ClassVar[str] = "tokens"  # of a batch

    vocab_size: Count
    d_model: Count
    num_layers: Few
    pattern: tuple[str, ...]
    blocks: tuple[NamedBlock, ...]
    max_length: Count = 512
    token_types: Count = 2
    norm: nn.Module | None = None
    pooler: bool = False
    embed_std: NonNegative = 0.02
    scan: bool = True
    remat: Remat = "none"
    dtype: DType = "float32"

    def __post_init__(self):
        pattern_blocks(self)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "b s"], ctx: Context | None = None, token_types: Int[Array, "b s"] | None = None
    ) -> Float[Array, "b s d"]:
        """A vector for each token; `token_types` are 0 where nothing is said. Positions count from 0, padding included, unless `ctx` says."""
        b, s = tokens.shape
        if s > self.max_length:
            raise ConfigError(
                f"{s} tokens exceed max_length={self.max_length} of the encoder; cut the text, or raise max_length"
            )
        ctx = Context() if ctx is None else ctx
        positions = jnp.broadcast_to(jnp.arange(s, dtype=jnp.int32), (b, s)) if ctx.positions is None else ctx.positions
        ctx = ctx.replace(positions=positions, token_ids=tokens if ctx.token_ids is None else ctx.token_ids)
        kinds = jnp.zeros((b, s), jnp.int32) if token_types is None else token_types

        x = self._embed("embedding", self.vocab_size, "vocab", tokens)
        x = x + self._embed("position", self.max_length, None, positions)
        x = x + self._embed("token_type", self.token_types, None, kinds)
        norm = norms["layer_norm"](dtype=self.dtype, parent=None) if self.norm is None else self.norm
        x = constrain(norm.copy(name="embedding_norm")(x.astype(self.dtype)), "batch", "seq", "embed")
        x = Stack(self.blocks, self.pattern, self.num_layers, self.scan, self.remat, name="stack")(x, ctx)
        if self.pooler:
            dense = Dense(self.d_model, dtype=self.dtype, axes=("embed", None), role="head", name="pooler")
            sow(self, "pooled", "vector", jnp.tanh(dense(x[:, 0])))
        return x

    def _embed(self, name: str, rows: int, axis: str | None, ids: Int[Array, "b s"]) -> Float[Array, "b s d"]:
        init = nn.initializers.normal(self.embed_std)
        table = param(self, name, init, (rows, self.d_model), (axis, "embed"), role="embeddings")
        return jnp.take(table, ids, axis=0)


def mean_of_tokens(x: Float[Array, "b s d"], ctx: Context | None = None) -> Float[Array, "b d"]:
    """The mean over the valid tokens, of length 1: what sentence encoders give (Reimers and Gurevych 2019)."""
    valid = jnp.ones(x.shape[:2], bool) if ctx is None or ctx.valid is None else ctx.valid
    total = jnp.where(valid[..., None], x.astype(jnp.float32), 0).sum(1)
    mean = total / jnp.maximum(valid.sum(1, keepdims=True), 1)
    return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)
