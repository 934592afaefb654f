"""Multi-head latent attention: keys and values of all heads are made of one short vector a token, and that vector is what is cached."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.core.fields import Count, DType, Positive
from moejax.core.initializers.usual import FanIn
from moejax.core.layer import Layer
from moejax.core.params import Dense, Initializer
from moejax.layers.mixers.attention import INITS, attend, extend_cache, rms_norm, rope, token_positions, visible
from moejax.layers.registry import mixers
from moejax.parallel import constrain


@mixers.register("latent_attention", slots=INITS)
class LatentAttention(Layer):
    """`[k_i, v_i] = W_i norm(W_c x)` for each head i, beside one rotary key that all heads share (DeepSeek-V2 and V3, 2024).

    A head's query and key are `head_dim` channels without positions and `rope_dim` with. The cache holds `rank + rope_dim` numbers a token.
    Masks, padding and decoding as in `Attention`.

    Attributes:
      num_heads: query heads.
      rank: r, of the vector that keys and values are made of.
      head_dim: channels of a query and key without positions.
      rope_dim: channels with rotary positions.
      value_dim: channels of a value.
      query_rank: of the vector that queries are made of, normalised too; None makes them of x.
      causal: whether later positions are hidden. Filled in by the model.
      rope_base: base of the rotary frequencies.
      use_bias: biases on the maps to the short vectors and on the output's.
      epsilon: of the two norms.
      init_qkv, init_out, max_length, dtype: as in `Attention`.
    """

    num_heads: Count
    rank: Count = 512
    head_dim: Count = 128
    rope_dim: Count = 64
    value_dim: Count = 128
    query_rank: Count | None = None
    causal: bool = True
    rope_base: Positive | None = 10_000.0
    use_bias: bool = False
    epsilon: Positive = 1e-6
    init_qkv: Initializer = FanIn()
    init_out: Initializer = FanIn()
    max_length: Count = 2048
    dtype: DType = "float32"

    def __post_init__(self):
        if self.rope_dim % 2:
            raise ConfigError(f"rope_dim={self.rope_dim} is odd; rotary positions need an even one")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"], ctx: Context) -> Float[Array, "b s d"]:
        b, s, d = ctx.fit(x)
        positions = token_positions(ctx, b, s)
        queries = self._queries(x).reshape(b, s, self.num_heads, self.head_dim + self.rope_dim)
        plain, turned = jnp.split(queries, [self.head_dim], axis=-1)
        q = jnp.concatenate([plain, self._turn(turned, positions)], axis=-1)
        short = self._map(x, self.rank + self.rope_dim, "kv_down", ("embed", None), self.use_bias)
        latent, key = jnp.split(short, [self.rank], axis=-1)
        latent = rms_norm(self, "kv_norm", latent, self.epsilon)[:, :, None]
        key = self._turn(key[:, :, None], positions)
        if ctx.decode:
            key, latent, key_positions, key_valid = extend_cache(self, key, latent, positions, ctx)
            mask = visible(positions, key_positions, causal=True, key_valid=key_valid)
        else:
            mask = visible(positions, positions, self.causal, None, ctx.valid, ctx.segments, ctx.segments)
        both = self._map(latent[:, :, 0], self.num_heads * (self.head_dim + self.value_dim), "kv_up", (None, "heads"))
        k, v = jnp.split(both.reshape(b, both.shape[1], self.num_heads, -1), [self.head_dim], axis=-1)
        k = jnp.concatenate([k, jnp.broadcast_to(key, (*k.shape[:3], self.rope_dim))], axis=-1)
        q, k, v = (constrain(a, "batch", "seq", "heads", None) for a in (q, k, v))
        y = attend(q, k, v, mask).reshape(b, s, -1)
        return self._map(y, d, "o", ("heads", "embed"), self.use_bias, self.init_out)

    def check_causal(self, where: str) -> None:
        """Raises ConfigError if this layer lets a token see later ones; a decoder calls it with the layer's place."""
        if not self.causal:
            raise ConfigError(f"{where}.causal=False lets tokens see the future in a decoder; remove it")

    def decodable(self) -> str | None:
        """None: what keys and values are made of is cached."""
        return None if self.causal else "bidirectional attention sees later tokens"

    def _queries(self, x: Float[Array, "b s d"]) -> Float[Array, "b s f"]:
        features = self.num_heads * (self.head_dim + self.rope_dim)
        if self.query_rank is None:
            return self._map(x, features, "q", ("embed", "heads"))
        short = self._map(x, self.query_rank, "q_down", ("embed", None), self.use_bias)
        return self._map(rms_norm(self, "q_norm", short, self.epsilon), features, "q_up", (None, "heads"))

    def _turn(self, x: Float[Array, "b s h c"], positions: Array) -> Float[Array, "b s h c"]:
        return x if self.rope_base is None else rope(x, positions, self.rope_base)

    def _map(
        self,
        x: Float[Array, "b s c"],
        features: int,
        name: str,
        axes: tuple[str | None, str | None],
        biased: bool = False,
        init: Initializer | None = None,
    ) -> Float[Array, "b s f"]:
        init = self.init_qkv if init is None else init
        return Dense(features, use_bias=biased, dtype=self.dtype, kernel_init=init, axes=axes, name=name)(x)
