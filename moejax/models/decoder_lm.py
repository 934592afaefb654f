"""The decoder language model: Llama, Mixtral, OLMoE, DeepSeek and kin, as far as their blocks can be named in a config."""

from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.core.fields import Count, DType, Few, NonNegative, Positive
from moejax.core.params import param
from moejax.layers.mixers.attention import token_positions
from moejax.layers.registry import norms
from moejax.models.inspection import check_causal
from moejax.models.parts import NamedBlock
from moejax.models.registry import models
from moejax.models.stack import Remat, Stack, block_table, pattern_blocks
from moejax.parallel import constrain


@models.register("decoder_lm", slots={"blocks": block_table(causal=True), "norm": norms})
class DecoderLM(nn.Module):
    """Embedding, a stack of causal blocks, a final norm and a head.

    Attributes:
      vocab_size: number of tokens v.
      d_model: width d.
      num_layers: blocks in all; a multiple of the pattern's length.
      pattern: names of `blocks`, repeated.
      blocks: name -> block.
      norm: the final norm; 'rms_norm' if left out.
      tied: the head is the transposed embedding.
      learned_positions: adds a learned vector for each of `max_length` positions (for blocks without rotary positions).
      max_length: tokens of a cache row, and rows of the position table.
      embed_std: standard deviation of the embedding at the start.
      logit_cap: logits become cap * tanh(logits / cap) (Gemma 2); None turns it off.
      scan, remat: see `Stack`.
      dtype: computation type of the blocks; parameters and logits are float32.

    Raises:
      ConfigError: a block is not causal, or the pattern does not fit.
    """

    causal: ClassVar[bool] = True
    reads: ClassVar[str] = "tokens"  # of a batch

    vocab_size: Count
    d_model: Count
    num_layers: Few
    pattern: tuple[str, ...]
    blocks: tuple[NamedBlock, ...]
    norm: nn.Module | None = None
    tied: bool = True
    learned_positions: bool = False
    max_length: Count = 2048
    embed_std: NonNegative = 0.02
    logit_cap: Positive | None = None
    scan: bool = True
    remat: Remat = "none"
    dtype: DType = "float32"

    def __post_init__(self):
        check_causal(pattern_blocks(self))
        super().__post_init__()

    @nn.compact
    def __call__(self, tokens: Int[Array, "b s"], ctx: Context | None = None) -> Float[Array, "b s v"]:
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ConfigError(f"decoder_lm reads ids of tokens [b, s], and was given {tokens.dtype}{list(tokens.shape)}")
        ctx = Context() if ctx is None else ctx
        positions = token_positions(ctx, *tokens.shape)
        ctx = ctx.replace(positions=positions, token_ids=tokens if ctx.token_ids is None else ctx.token_ids)

        init = nn.initializers.normal(self.embed_std)
        role = ("embeddings", "head") if self.tied else "embeddings"
        embedding = param(self, "embedding", init, (self.vocab_size, self.d_model), ("vocab", "embed"), role=role)
        x = jnp.take(embedding, tokens, axis=0)
        if self.learned_positions:
            table = param(self, "position", init, (self.max_length, self.d_model), (None, "embed"), role="embeddings")
            x = x + jnp.take(table, positions, axis=0)
        x = constrain(x.astype(self.dtype), "batch", "seq", "embed")

        x = Stack(self.blocks, self.pattern, self.num_layers, self.scan, self.remat, name="stack")(x, ctx)
        norm = norms["rms_norm"](dtype=self.dtype, parent=None) if self.norm is None else self.norm
        x = norm.copy(name="final_norm")(x)

        if self.tied:
            head = embedding.T
        else:
            shape, axes = (self.d_model, self.vocab_size), ("embed", "vocab")
            head = param(self, "head", nn.initializers.lecun_normal(), shape, axes, role="head")
        logits = jnp.einsum("bsd,dv->bsv", x, head.astype(x.dtype), preferred_element_type=jnp.float32)
        if self.logit_cap is not None:
            logits = self.logit_cap * jnp.tanh(logits / self.logit_cap)
        return constrain(logits, "batch", "seq", "vocab")
