"""Softmax attention: grouped heads, rotary positions, one rule for who sees whom, and a cache for decoding.

Letters: b batch, s tokens (queries), t keys, h query heads, j key-value heads, c channels of a head, d model width.
"""

import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.core.fields import Count, DType, Positive
from moejax.core.initializers.registry import initializers
from moejax.core.initializers.usual import FanIn
from moejax.core.layer import Layer
from moejax.core.params import Dense, Initializer, param
from moejax.layers.registry import mixers
from moejax.parallel import constrain, current
from pallas_kernels.implementations import current_chip

HIDDEN = -0.7 * float(
    jnp.finfo(jnp.float32).max
)  # the score of a key that is not shown; finite, so that padding has a mean and no NaN
CHUNK = 512  # queries of a long sequence whose scores are in memory at a time
INITS = {"init_qkv": initializers, "init_out": initializers}


@mixers.register("attention", slots=INITS)
class Attention(Layer):
    """Multi-head attention with `num_kv_heads` shared key-value heads (Vaswani et al. 2017; Ainslie et al. 2023).

    Masks follow the context: a token attends to valid tokens of its own segment, when causal only to positions up to its
    own, and with a window to the nearest `window` positions. Scores and softmax are float32 whatever `dtype` is.

    With `ctx.decode` the valid new tokens are appended to the collection 'cache' and the queries attend to the whole
    cache. Rows of a batch may hold different numbers of tokens, and tokens with `ctx.valid` False leave no trace: a
    right-padded prompt and a block that sees only some tokens (mixture-of-depths) need nothing special.

    Attributes:
      num_heads: query heads.
      num_kv_heads: key-value heads; a divisor of `num_heads`. None means `num_heads`.
      head_dim: channels of a head. None means d / num_heads.
      causal: whether later positions are hidden. Filled in by the model.
      rope_base: base of the rotary frequencies; None turns rotary positions off.
      window: number of positions that a token sees on each side, itself included. None means all.
      use_bias: biases on all four projections, or on those of 'qkv' alone (Qwen2).
      qk_norm: RMS norm of queries and keys: 'none', per 'head' (Dehghani et al. 2023, Qwen3) or over the whole
        'projection' (OLMoE).
      qk_norm_epsilon: of that norm, added to the mean square.
      init_qkv, init_out: how the projections to queries, keys and values, and that of the output, start.
      max_length: tokens that the cache holds.
      dtype: computation type; parameters stay float32.
    """

    num_heads: Count
    num_kv_heads: Count | None = None
    head_dim: Count | None = None
    causal: bool = True
    rope_base: Positive | None = 10_000.0
    window: Count | None = None
    use_bias: bool | Literal["qkv"] = False
    qk_norm: Literal["none", "head", "projection"] = "none"
    qk_norm_epsilon: Positive = 1e-6
    init_qkv: Initializer = FanIn()
    init_out: Initializer = FanIn()
    max_length: Count = 2048
    dtype: DType = "float32"

    def __post_init__(self):
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            raise ConfigError(f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}")
        if self.head_dim is not None and self.rope_base is not None and self.head_dim % 2:
            raise ConfigError(f"head_dim={self.head_dim} is odd; rotary positions need an even one, or rope_base=None")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"], ctx: Context) -> Float[Array, "b s d"]:
        b, s, d = ctx.fit(x)
        kv_heads = self.num_kv_heads or self.num_heads
        positions = token_positions(ctx, b, s)
        q = self._project(x, ctx, "q", self.num_heads, "heads")
        k = self._project(x, ctx, "k", kv_heads, "kv")
        v = self._project(x, ctx, "v", kv_heads, "kv")
        plain = q
        if self.rope_base is not None:
            q, k = rope(q, positions, self.rope_base), rope(k, positions, self.rope_base)
        if ctx.decode:
            k, v, key_positions, key_valid = extend_cache(self, k, v, positions, ctx)
            mask = visible(positions, key_positions, causal=True, window=self.window, key_valid=key_valid)
        else:
            mask = visible(positions, positions, self.causal, self.window, ctx.valid, ctx.segments, ctx.segments)
        q, k, v = self._split_heads(q, k, v)
        y = self._weigh(attend(q, k, v, mask), x, plain, ctx)
        return self._linear(y.reshape(b, s, -1), ctx, d, ("heads", "embed"), "o", self.init_out)

    def check_causal(self, where: str) -> None:
        """Raises ConfigError if this layer lets a token see later ones; a decoder calls it with the layer's place."""
        if not self.causal:
            raise ConfigError(f"{where}.causal=False lets tokens see the future in a decoder; remove it")

    def decodable(self) -> str | None:
        """None: keys and values are cached; bidirectional attention has no cache to fill."""
        return None if self.causal else "bidirectional attention sees later tokens"

    def _weigh(
        self, y: Float[Array, "b s h c"], x: Float[Array, "b s d"], q: Float[Array, "b s h c"], ctx: Context
    ) -> Float[Array, "b s h c"]:
        """What the output projection sums: the head outputs, which mixtures of heads weigh by the input or the unrotated queries."""
        return y

    def _split_heads(
        self, q: Float[Array, "b s h c"], k: Float[Array, "b t j c"], v: Float[Array, "b t j c"]
    ) -> tuple[Float[Array, "b s h c"], Float[Array, "b t i c"], Float[Array, "b t i c"]]:
        """On a tensor-parallel mesh each device computes some of the heads; key-value heads that are too few to be split are
        repeated, so that each device has those that its queries need.

        Raises:
          ConfigError: query heads that would be cut; their parameters' size does not tell where a head ends.
        """
        parallel = current()
        ways = 1 if parallel is None else parallel.mesh.shape["tensor"]
        if self.num_heads % ways:
            raise ConfigError(
                f"num_heads={self.num_heads} in {'/'.join(self.path)} does not divide among tensor={ways} of the mesh; take "
                f"{ways} or another multiple, or another size of tensor"
            )
        if k.shape[2] % ways:
            k, v = (jnp.repeat(x, self.num_heads // k.shape[2], axis=2) for x in (k, v))
        return tuple(constrain(x, "batch", "seq", "heads", None) for x in (q, k, v))

    def _project(self, x: Float[Array, "b s d"], ctx: Context, name: str, heads: int, axis: str) -> Float[Array, "b s h c"]:
        b, s, d = x.shape
        y = self._linear(x, ctx, heads * self._head_dim(d), ("embed", axis), name, self.init_qkv)
        normed = self.qk_norm if name in ("q", "k") else "none"
        if normed == "projection":
            y = rms_norm(self, f"{name}_norm", y, self.qk_norm_epsilon)
        y = y.reshape(b, s, heads, -1)
        return rms_norm(self, f"{name}_norm", y, self.qk_norm_epsilon) if normed == "head" else y

    def _linear(
        self, x: Float[Array, "b s d"], ctx: Context, features: int, axes: tuple[str, str], name: str, init: Initializer
    ) -> Float[Array, "b s f"]:
        """One of the projections 'q', 'k', 'v' and 'o', which mixtures of projections route."""
        return Dense(features, use_bias=self._biased(name), dtype=self.dtype, kernel_init=init, axes=axes, name=name)(x)

    def _biased(self, name: str) -> bool:
        """Whether a projection has a bias."""
        return self.use_bias is True or (self.use_bias == "qkv" and name != "o")

    def _head_dim(self, d: int) -> int:
        if self.head_dim is not None:
            return self.head_dim
        size, rest = divmod(d, self.num_heads)
        where = "/".join(self.path)
        if rest:
            raise ConfigError(f"num_heads={self.num_heads} does not divide d_model={d} in {where}; or give head_dim")
        if self.rope_base is not None and size % 2:
            raise ConfigError(f"d_model={d} / num_heads={self.num_heads} gives odd heads in {where}; or give head_dim")
        return size


def attend(
    q: Float[Array, "b s h c"], k: Float[Array, "b t j c"], v: Float[Array, "b t j o"], mask: Bool[Array, "b s t"]
) -> Float[Array, "b s h o"]:
    """Softmax attention to the keys that `mask` shows.

    The scores of all queries are `[h, s, t]` in float32, which in long sequences is more than anything else in a block. So
    they are computed for `CHUNK` queries at a time, and again in the backward pass, where `CHUNK` divides s.

    Raises:
      ConfigError: float16 on a CPU.
    """
    if q.dtype == jnp.float16 and current_chip().platform == "cpu":
        raise ConfigError(
            "dtype='float16' cannot be computed on a CPU: XLA has no scores of float16 there; take 'bfloat16' or 'float32'"
        )
    b, s = q.shape[:2]
    if s <= CHUNK or s % CHUNK:
        return _attend(q, k, v, mask)

    def chunk(_: None, rows: tuple[Array, Array]) -> tuple[None, Array]:
        queries, shown = rows
        return None, _attend(queries, k, v, shown)

    rows = tuple(x.reshape(b, s // CHUNK, CHUNK, *x.shape[2:]).swapaxes(0, 1) for x in (q, mask))
    _, y = jax.lax.scan(jax.checkpoint(chunk, prevent_cse=False), None, rows)
    return y.swapaxes(0, 1).reshape(*q.shape[:3], v.shape[-1])


def _attend(
    q: Float[Array, "b s h c"], k: Float[Array, "b t j c"], v: Float[Array, "b t j o"], mask: Bool[Array, "b s t"]
) -> Float[Array, "b s h o"]:
    """Softmax attention of all queries at once.

    The queries that share a key-value head are rows of one matrix, so that scores are made, normalised and multiplied as they lie in
    memory: on a CPU transposing them cost as much as the products.
    """
    b, s, h, c = q.shape
    t, j = k.shape[1:3]
    together = ((0, 1), (0, 1))
    q = q.reshape(b, s, j, h // j, c).transpose(0, 2, 3, 1, 4).reshape(b, j, -1, c)
    k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))
    scores = jax.lax.dot_general(q, k, (((3,), (3,)), together), preferred_element_type=jnp.float32) / math.sqrt(c)
    scores = jnp.where(mask[:, None, None], scores.reshape(b, j, -1, s, t), HIDDEN)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(b, j, -1, t)
    y = jax.lax.dot_general(weights, v, (((3,), (2,)), together))
    return y.reshape(b, j, -1, s, v.shape[-1]).transpose(0, 3, 1, 2, 4).reshape(b, s, h, -1)


def visible(
    query_positions: Int[Array, "b s"],
    key_positions: Int[Array, "b t"],
    causal: bool,
    window: Count | None = None,
    key_valid: Bool[Array, "b t"] | None = None,
    query_segments: Int[Array, "b s"] | None = None,
    key_segments: Int[Array, "b t"] | None = None,
) -> Bool[Array, "b s t"]:
    """Which keys each query may attend to.

    Order is that of the positions, not of the rows, so that gathered tokens need no special case; positions have to be
    distinct within a segment. A query that may see nothing (padding) gets the plain mean of the values: finite and unused.
    """
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    mask = distance >= 0 if causal else jnp.ones(distance.shape, bool)
    if window is not None:
        mask &= jnp.abs(distance) < window
    if key_valid is not None:
        mask &= key_valid[:, None, :]
    if query_segments is not None and key_segments is not None:
        mask &= query_segments[:, :, None] == key_segments[:, None, :]
    return mask


def extend_cache(
    module: Any, k: Float[Array, "b s j c"], v: Float[Array, "b s j o"], positions: Int[Array, "b s"], ctx: Context
) -> tuple[Float[Array, "b t j c"], Float[Array, "b t j o"], Int[Array, "b t"], Bool[Array, "b t"]]:
    """Appends the valid tokens to the cache of a layer, in order of arrival; its keys, values, positions and filled entries.

    Tokens past `max_length` are lost: how full a row is, is data, so the caller has to count (`serve.generate` does).
    """
    b, s = k.shape[:2]
    where = "/".join(module.path)
    if not module.causal:
        raise ConfigError(f"bidirectional attention {where} cannot decode token by token")
    if ctx.segments is not None:
        raise ConfigError(f"packed documents (ctx.segments) cannot be decoded in {where}; give one document a row")
    if s > module.max_length:
        raise ConfigError(f"{s} tokens exceed max_length={module.max_length} of the cache in {where}; raise max_length")
    keys = module.variable("cache", "key", jnp.zeros, (b, module.max_length, *k.shape[2:]), k.dtype)
    values = module.variable("cache", "value", jnp.zeros, (b, module.max_length, *v.shape[2:]), v.dtype)
    at = module.variable("cache", "position", jnp.zeros, (b, module.max_length), jnp.int32)
    used = module.variable("cache", "used", jnp.zeros, (b,), jnp.int32)
    if not module.is_initializing():
        valid = jnp.ones((b, s), bool) if ctx.valid is None else ctx.valid
        slot = used.value[:, None] + jnp.cumsum(valid, axis=1) - 1
        slot = jnp.where(valid, slot, module.max_length)  # out of bounds: not written
        row = jnp.arange(b)[:, None]
        keys.value = keys.value.at[row, slot].set(k, mode="drop")
        values.value = values.value.at[row, slot].set(v, mode="drop")
        at.value = at.value.at[row, slot].set(positions, mode="drop")
        used.value = used.value + valid.sum(axis=1)
    filled = jnp.arange(module.max_length) < used.value[:, None]
    return keys.value, values.value, at.value, filled


def rope(x: Float[Array, "b s h c"], positions: Int[Array, "b s"], base: float = 10_000.0) -> Float[Array, "b s h c"]:
    """Rotary positions (Su et al. 2021, eq. 34) in the half-rotation layout of Llama's published weights.

    Channel i of the first half and channel i of the second are one plane, turned by positions * base^(-2i/c). Angles are
    float32: bfloat16 cannot tell positions above 256 apart.
    """
    half = x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[:, :, None, None] * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def token_positions(ctx: Context, b: int, s: int) -> Int[Array, "b s"]:
    """The context's positions, or 0..s-1 where it has none. Decoding has no default: the prefix is not in the arguments."""
    if ctx.positions is not None:
        return ctx.positions
    if ctx.decode:
        raise ConfigError("decoding needs ctx.positions: new tokens do not start at position 0")
    return jnp.broadcast_to(jnp.arange(s, dtype=jnp.int32), (b, s))


def rms_norm(module: nn.Module, name: str, x: Float[Array, "*b c"], eps: float) -> Float[Array, "*b c"]:
    """RMS norm over the last axis, with a scale that is the parameter `name` of the layer that asks."""
    scale = param(module, name, nn.initializers.ones, (x.shape[-1],), (None,), role="norms")
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps) * scale
    return y.astype(x.dtype)
