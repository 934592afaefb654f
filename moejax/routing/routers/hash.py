"""Hash layers (Roller et al. 2021): the token's id says which expert takes it. Nothing is learnt and nothing is balanced."""

from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from jaxtyping import Array, Float, Int

from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.core.fields import NonNegative, Whole
from moejax.routing.routers.base import Router, routers

# Hash -> the field of the table that it is made from.
HASHES = {
    "random": None,
    "balanced": "frequencies",
    "clustered": "clusters",
    "dispersed": "clusters",
    "predicted": "successors",
    "position": None,
    "previous": None,
    "bigram": None,
    "next": None,
}
# Small enough for a probability of exactly 0, and finite, so that no loss or statistic meets an infinity.
_NEVER = -1e9


@routers.register("hash")
class Hash(Router):
    """Logits that are 0 for the expert of the token's hash and -1e9 for all others; with `top_k` and k=1 its weight is 1.

    Where a rule wants several logits of each expert they are all alike, and null experts get -1e9. Without parameters. The same token goes to the same expert in training and inference. Blocks that are to hash differently
    take different seeds. Padding is not routed, as everywhere; a batch can be unbalanced even where the corpus is not, so route
    dropless or with room.

    Attributes:
      num_experts: e.
      hash: of the token's id, 'random', or by a table: 'balanced' by frequency; 'clustered', similar tokens to one expert;
        'dispersed', similar tokens to different experts; 'predicted', by the token that most often follows. The paper's other ablations: 'position' in the document; the 'previous'
        token's id; the 'bigram' of both; the 'next' token's id, an oracle. Those of neighbours need whole sequences, in order,
        and cannot decode with a cache.
      seed: of the hash.
      frequencies: for 'balanced', how often each id occurs in the training data: ids are given out by descending frequency, each
        to the expert with the lowest sum so far.
      clusters: for 'clustered' and 'dispersed', the cluster of each id.
      successors: for 'predicted', the id that a bigram model expects after each id.
      leak: accepts 'next' in a decoder, where it reads what is to be predicted.

    Tables may be recipes (`moejax.data.computed`), such as `{'from_data': 'token_frequencies'}`, which `fit`
    replaces by what it counts. Until then, as in a model that is only traced, ids are dealt out in turn.

    Raises:
      ConfigError: unknown hash, a table missing or not wanted, no token ids in the context, decoding where it cannot.
    """

    hash: Literal[*HASHES] = "random"
    seed: int = 0
    frequencies: tuple[NonNegative, ...] | Mapping[str, Any] | None = None
    clusters: tuple[Whole, ...] | Mapping[str, Any] | None = None
    successors: tuple[Whole, ...] | Mapping[str, Any] | None = None
    leak: bool = False

    def __post_init__(self) -> None:
        for name in ("frequencies", "clusters", "successors"):
            if (HASHES[self.hash] == name) != (getattr(self, name) is not None):
                needs = [hash for hash, table in HASHES.items() if table == name]
                raise ConfigError(
                    f"hash='{self.hash}' with {name}={getattr(self, name)}; {', '.join(needs)} needs them, others do not"
                )
            if isinstance(getattr(self, name), dict):
                object.__setattr__(self, name, FrozenDict(getattr(self, name)))  # modules are hashed
        if self.hash == "clustered" and isinstance(self.clusters, tuple) and max(self.clusters) >= self.num_experts:
            raise ConfigError(
                f"clusters has {max(self.clusters) + 1} clusters for num_experts={self.num_experts}; make them equal"
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Float[Array, "g n d"], ctx: Context) -> Float[Array, "g n e"]:
        logits = as_logits(self.expert(ctx)[..., None], self.num_experts)
        each, null = self.outputs
        return jnp.pad(jnp.repeat(logits, each, axis=-1), ((0, 0), (0, 0), (0, null)), constant_values=_NEVER)

    def expert(self, ctx: Context) -> Int[Array, "g n"]:
        """Each token's expert."""
        ids = ctx.positions if self.hash == "position" else ctx.token_ids
        if ids is None:
            raise ConfigError(
                f"the router 'hash' with hash='{self.hash}' needs the context's token ids or positions; models of tokens give them"
            )
        if HASHES[self.hash] is not None:
            table = self._table()
            return ids % self.num_experts if table is None else jnp.asarray(table)[ids]
        if self.hash in ("previous", "bigram", "next"):
            if ctx.decode:
                raise ConfigError(f"hash='{self.hash}' cannot decode with a cache: the token beside is not there")
            beside = neighbour(ids, ctx.positions, 1 if self.hash == "next" else -1)
            ids = (_mix(beside, self.seed + 1) ^ ids.astype(jnp.uint32)) if self.hash == "bigram" else beside
        return (_mix(ids, self.seed) % self.num_experts).astype(jnp.int32)

    def check_causal(self, where: str) -> None:
        """Raises ConfigError if the next token decides and the config does not say that this is meant."""
        if self.hash == "next" and not self.leak:
            raise ConfigError(
                f"{where}.hash='next' reads the token that is to be predicted; set leak=True for the paper's oracle"
            )

    def decodable(self) -> str | None:
        """None if decoding one token at a time gives the experts of a whole forward pass; else the reason why not."""
        return f"hash='{self.hash}' looks at a neighbouring token" if self.hash in ("previous", "bigram", "next") else None

    def _table(self) -> Int[np.ndarray, "v"] | None:
        given = getattr(self, HASHES[self.hash])
        if not isinstance(given, tuple):
            return None
        match self.hash:
            case "clustered":
                return np.asarray(given, np.int32)
            case "balanced":
                return balanced_table(given, self.num_experts)
            case "dispersed":
                return dispersed_table(given, self.num_experts)
        mixed = _mix(np.asarray(given), self.seed)
        return np.asarray(mixed % self.num_experts, np.int32)


def balanced_table(frequencies: tuple[float, ...], num_experts: int) -> Int[np.ndarray, "v"]:
    """Each id's expert: ids by descending frequency (ties to the lower id), each to the expert with the lowest sum so far."""
    table, sums = np.zeros(len(frequencies), np.int32), np.zeros(num_experts)
    for token in np.argsort(-np.asarray(frequencies, float), kind="stable"):
        table[token] = sums.argmin()
        sums[table[token]] += frequencies[token]
    return table


def dispersed_table(clusters: tuple[int, ...], num_experts: int) -> Int[np.ndarray, "v"]:
    """Each id's expert: the ids of one cluster are dealt out to the experts in turn, and those of the next go on from there."""
    table = np.zeros(len(clusters), np.int32)
    table[np.argsort(clusters, kind="stable")] = np.arange(len(clusters)) % num_experts
    return table


def as_logits(expert: Int[Array, "g n k"], num_experts: int) -> Float[Array, "g n e"]:
    """0 for the given experts and -1e9 for all others."""
    return jnp.where((expert[..., None] == jnp.arange(num_experts)).any(-2), 0.0, _NEVER)


def neighbour(ids: Int[Array, "g n"], positions: Int[Array, "g n"] | None, step: Literal[-1, 1]) -> Int[Array, "g n"]:
    """The id before (-1) or after (1) each token, -1 where its document has none."""
    left, right = (1, 0) if step < 0 else (0, 1)
    shifted = jnp.pad(ids, ((0, 0), (left, right)), constant_values=-1)
    beside = shifted[:, :-1] if step < 0 else shifted[:, 1:]
    if positions is None:
        return beside
    starts = positions == 0
    edge = starts if step < 0 else jnp.pad(starts[:, 1:], ((0, 0), (0, 1)), constant_values=True)
    return jnp.where(edge, -1, beside)


def _mix(ids: Array | np.ndarray, seed: int) -> Array | np.ndarray:
    """32 well mixed bits of an integer, in NumPy or JAX as it is: the finaliser of MurmurHash3."""
    h = ids.astype(np.uint32) + np.uint32((seed * 0x9E3779B9 + 0x7F4A7C15) & 0xFFFFFFFF)
    h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
