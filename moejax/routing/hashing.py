"""Hash layers (Roller et al. 2021): the token's id says which expert takes it. Nothing is learnt and nothing is balanced."""

from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moejax.context import Context
from moejax.errors import ConfigError
from moejax.routing.routers import routers

HASHES = ("random", "balanced", "position", "previous", "bigram")
# Small enough for a probability of exactly 0, and finite, so that no loss or statistic meets an infinity.
_NEVER = -1e9


@routers.register("hash")
class Hash(nn.Module):
    """Logits that are 0 for the expert of the token's hash and -1e9 for all others; with `top_k` and k=1 its weight is 1.

    Without parameters. The same token goes to the same expert in training and inference. Blocks that are to hash differently
    take different seeds. Padding is not routed, as everywhere; a batch can be unbalanced even where the corpus is not, so route
    dropless or with room.

    Attributes:
      num_experts: e.
      hash: 'random' or 'balanced' over vocabulary ids; 'position' in the document; the 'previous' token's id; the 'bigram' of
        both (the paper's ablations; the last two need whole sequences, in order, and cannot decode with a cache).
      seed: of the hash.
      frequencies: for 'balanced', how often each id occurs in the training data: ids are given out by descending frequency, each
        to the expert with the lowest sum so far. `moejax.data.token_frequencies` counts them.

    Raises:
      ConfigError: unknown hash, frequencies missing or not wanted, no token ids in the context, decoding where it cannot.
    """

    num_experts: int
    outputs_per_expert: int = 1
    hash: Literal["random", "balanced", "position", "previous", "bigram"] = "random"
    seed: int = 0
    frequencies: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.hash not in HASHES:
            raise ConfigError(f"hash='{self.hash}' is unknown; valid names: {', '.join(HASHES)}")
        if (self.hash == "balanced") != (self.frequencies is not None):
            raise ConfigError(f"hash='{self.hash}' with frequencies={self.frequencies}; 'balanced' needs them, others do not")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Float[Array, "g n d"], ctx: Context) -> Float[Array, "g n e"]:
        expert = self._expert(ctx, x.shape[1])
        return jnp.where(expert[..., None] == jnp.arange(self.num_experts), 0.0, _NEVER)

    def _expert(self, ctx: Context, n: int) -> Int[Array, "g n"]:
        ids = ctx.positions if self.hash == "position" else ctx.token_ids
        if ids is None:
            raise ConfigError(
                f"the router 'hash' with hash='{self.hash}' needs the context's token ids or positions; models of tokens give them"
            )
        if self.hash == "balanced":
            return jnp.asarray(balanced_table(self.frequencies, self.num_experts))[ids]
        if self.hash in ("previous", "bigram"):
            if ctx.decode:
                raise ConfigError(f"hash='{self.hash}' cannot decode with a cache: the token before is not there")
            before = self._previous(ctx, ids)
            ids = before if self.hash == "previous" else (_mix(before, self.seed + 1) ^ ids.astype(jnp.uint32))
        return (_mix(ids, self.seed) % self.num_experts).astype(jnp.int32)

    @staticmethod
    def _previous(ctx: Context, ids: Int[Array, "g n"]) -> Int[Array, "g n"]:
        """The id before, -1 at the start of a document."""
        before = jnp.pad(ids[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
        return before if ctx.positions is None else jnp.where(ctx.positions == 0, -1, before)


def balanced_table(frequencies: tuple[float, ...], num_experts: int) -> Int[np.ndarray, "v"]:
    """Each id's expert: ids by descending frequency (ties to the lower id), each to the expert with the lowest sum so far."""
    table, sums = np.zeros(len(frequencies), np.int32), np.zeros(num_experts)
    for token in np.argsort(-np.asarray(frequencies, float), kind="stable"):
        table[token] = sums.argmin()
        sums[table[token]] += frequencies[token]
    return table


def _mix(ids: Array, seed: int) -> Array:
    """32 well mixed bits of an integer: the finaliser of MurmurHash3."""
    h = ids.astype(jnp.uint32) + jnp.uint32((seed * 0x9E3779B9 + 0x7F4A7C15) & 0xFFFFFFFF)
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
