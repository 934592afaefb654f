"""The vision transformer (Dosovitskiy et al. 2021): patches, a bidirectional stack, pooling, a linear head."""

from typing import ClassVar, Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.core.fields import Count, DType, Few
from moejax.core.params import Dense, param
from moejax.layers.registry import norms
from moejax.models.parts import NamedBlock
from moejax.models.registry import models
from moejax.models.stack import Remat, Stack, block_table, pattern_blocks
from moejax.parallel import constrain


@models.register("vit", slots={"blocks": block_table(causal=False, rope_base=None), "norm": norms})
class ViT(nn.Module):
    """Image classifier.

    Attributes:
      image_size: side of the square image, pixels; a multiple of `patch_size`.
      channels: colour channels.
      patch_size: side of a patch, pixels.
      num_classes: classes.
      d_model, num_layers, pattern, blocks, scan, remat, dtype: as in the decoder.
      norm: the final norm; 'layer_norm' if left out.
      positions: 'learned' vectors, or fixed sines and cosines of the two coordinates ('sincos2d', Beyer et al. 2022).
      pooling: 'mean' over the valid patches, or a learned extra token 'cls', put first.

    Raises:
      ConfigError: sizes do not fit, or an option is unknown.
    """

    reads: ClassVar[str] = "image"  # of a batch

    image_size: Count
    channels: Count
    patch_size: Count
    num_classes: Count
    d_model: Count
    num_layers: Few
    pattern: tuple[str, ...]
    blocks: tuple[NamedBlock, ...]
    norm: nn.Module | None = None
    positions: Literal["learned", "sincos2d"] = "learned"
    pooling: Literal["mean", "cls"] = "mean"
    scan: bool = True
    remat: Remat = "none"
    dtype: DType = "float32"

    def __post_init__(self):
        pattern_blocks(self)
        if self.image_size % self.patch_size:
            raise ConfigError(f"patch_size={self.patch_size} does not divide image_size={self.image_size}")
        if self.positions == "sincos2d" and self.d_model % 4:
            raise ConfigError(f"d_model={self.d_model} must be a multiple of 4 for positions='sincos2d'")
        super().__post_init__()

    @nn.compact
    def __call__(self, images: Float[Array, "b h w ch"], ctx: Context | None = None) -> Float[Array, "b classes"]:
        """Class scores of `images`. Fields of `ctx` are per patch `[b, n]`, or per image `[b, 1]`."""
        if images.shape[1:] != (self.image_size, self.image_size, self.channels):
            expected = (self.image_size, self.image_size, self.channels)
            raise ConfigError(f"images of shape {images.shape[1:]} given to a ViT for {expected}; change its config")
        x = patches(images, self.patch_size)
        b, n, _ = x.shape
        ctx = _per_patch(Context() if ctx is None else ctx, b, n)
        x = Dense(self.d_model, dtype=self.dtype, axes=(None, "embed"), role="embeddings", name="patch")(ctx.clean(x))
        x = x + self._position_table(n).astype(x.dtype)
        if self.pooling == "cls":
            init = nn.initializers.normal(0.02)
            cls = param(self, "cls", init, (self.d_model,), ("embed",), role="embeddings").astype(x.dtype)
            x = jnp.concatenate([jnp.broadcast_to(cls, (b, 1, self.d_model)), x], axis=1)
            ctx = _with_cls(ctx)

        x = constrain(x, "batch", "seq", "embed")
        x = Stack(self.blocks, self.pattern, self.num_layers, self.scan, self.remat, name="stack")(x, ctx)
        norm = norms["layer_norm"](dtype=self.dtype, parent=None) if self.norm is None else self.norm
        x = norm.copy(name="final_norm")(x)

        x = x[:, 0] if self.pooling == "cls" else _mean(x.astype(jnp.float32), ctx.valid)
        # A head of zeros: every class is equally likely at the start, whatever the features.
        zeros = nn.initializers.zeros
        head = Dense(self.num_classes, kernel_init=zeros, axes=("embed", "vocab"), role="head", name="head")
        return head(x.astype(jnp.float32))

    def _position_table(self, n: int) -> Float[Array, "n d"]:
        if self.positions == "sincos2d":
            return jnp.asarray(sincos2d(self.image_size // self.patch_size, self.d_model))
        return param(self, "position", nn.initializers.normal(0.02), (n, self.d_model), (None, "embed"), role="embeddings")


def patches(images: Float[Array, "b h w ch"], size: int) -> Float[Array, "b n px"]:
    """Square patches in reading order, each flattened (row, column, channel)."""
    b, h, w, ch = images.shape
    x = images.reshape(b, h // size, size, w // size, size, ch)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, (h // size) * (w // size), size * size * ch)


def sincos2d(side: int, d: int, base: float = 10_000.0) -> Float[np.ndarray, "n d"]:
    """Fixed position vectors of a `side` x `side` grid: d/4 sines and cosines of the row, then as many of the column."""
    frequency = base ** (-np.arange(d // 4) / (d // 4))
    row, column = np.divmod(np.arange(side * side), side)
    angles = [row[:, None] * frequency, column[:, None] * frequency]
    return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1).astype(np.float32)


def _per_patch(ctx: Context, b: int, n: int) -> Context:
    ctx = ctx.map_tokens(lambda field: jnp.broadcast_to(field, (b, n)))
    if ctx.positions is None:
        ctx = ctx.replace(positions=jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (b, n)))
    return ctx


def _with_cls(ctx: Context) -> Context:
    """The context with an entry for the class token: valid where any patch is, at position 0, otherwise like patch 0."""
    wider = ctx.map_tokens(lambda field: jnp.concatenate([field[:, :1], field], axis=1))
    if ctx.valid is not None:
        wider = wider.replace(valid=wider.valid.at[:, 0].set(ctx.valid.any(axis=1)))
    return wider.replace(positions=jnp.pad(ctx.positions + 1, ((0, 0), (1, 0))))


def _mean(x: Float[Array, "b n d"], valid: Bool[Array, "b n"] | None) -> Float[Array, "b d"]:
    if valid is None:
        return x.mean(axis=1)
    mask = valid[:, :, None]
    return jnp.where(mask, x, 0).sum(axis=1) / jnp.maximum(mask.sum(axis=1), 1)
