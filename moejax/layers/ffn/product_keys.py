"""Product-key layers: each token retrieves a few of n * n tiny experts (PEER, He 2024) or memory values (PKM, Lample et al. 2019)."""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from moejax.core.context import Context
from moejax.core.control import Site, control
from moejax.core.errors import ConfigError, check_choice
from moejax.core.fields import Count, NonNegative, Positive, Rate
from moejax.core.layer import RowWise
from moejax.core.params import param
from moejax.core.sowing import sow
from moejax.dispatch.expert_parallel.rows import by_device
from moejax.experts.rank_one import RankOne, check_platform
from moejax.experts.registry import Activation
from moejax.layers.registry import ffns
from moejax.routing.plan import dropless
from pallas_kernels.product_keys import IMPLEMENTATIONS, product_key_top_k

SCORES = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid, "relu": jax.nn.relu}


@dataclasses.dataclass(frozen=True)
class Follow:
    """State `name` follows a step's means, `sum / count` of what was measured, at a rate of 1 - `momentum`."""

    name: str
    momentum: float

    def after_step(self, site: Site) -> Site:
        count = jnp.maximum(site.measured["count"], 1e-9)
        now = {key: value / count for key, value in site.measured.items() if key != "count"}
        moved = jax.tree.map(lambda old, new: self.momentum * old + (1 - self.momentum) * new, site.state[self.name], now)
        return site.replace(state={**site.state, self.name: moved})


@ffns.register("product_keys")
class ProductKeys(RowWise):
    """`y = sum over heads and their k best experts of g act(<x, u>) v`, found among n * n in O(n) time.

    A head's query has two halves; expert `a * n + b` scores `<q_1, c_1[a]> + <q_2, c_2[b]>`, so the best experts are among
    the pairs of each half's k best. Experts (and sub-keys) are shared by all heads; per token the layer is a network of heads * k
    hidden units that is put together anew. No balance loss: normalised queries keep the usage even.

    Normalising over the batch lets tokens of a training batch see each other, later ones too; outside training it uses running
    statistics and a token depends on itself alone (so it counts as `RowWise`). 'layer' is the strict substitute.

    Attributes:
      num_keys: n, sub-keys of each half; there are n * n experts.
      heads: h, each with its own query.
      k: experts of a head.
      query_dim: width of a query, both halves together.
      values_only: memory values instead of experts (PKM).
      activation: of an expert, a name of `ACTIVATIONS`; 'gelu' is the tanh form, 'gelu_exact' PyTorch's default.
      score: g, from the scores of a head's k: 'softmax' over them; 'sigmoid' or 'relu' of each (Csordas et al. 2023).
      query_norm: 'batch' over valid tokens, 'layer', or 'none'.
      query_norm_epsilon: of that norm, added to the variance; None is 1e-5 for 'batch' and 1e-6 for 'layer'.
      shared_keys: all heads use the same sub-keys; False gives each its own (Lample et al. 2019).
      momentum: of the running statistics of queries.
      key_std: standard deviation of sub-keys at the start.
      implementation: of the kernels; 'auto' or a name.

    Collections: sows 'stats' usage (share of experts that were picked in the last few hundred training batches), unevenness
    (Kullback-Leibler divergence of their summed weights from uniform, nats) and entropy (of a head's weights, nats). Keeps running
    statistics and usage in 'router_state', which controllers move after every optimizer step.

    Raises:
      ConfigError: sizes that do not fit, unknown options.
    """

    num_keys: Count
    heads: Count = 8
    k: Count = 16
    query_dim: Count = 128
    values_only: bool = False
    activation: Activation = "gelu"
    score: Literal["softmax", "sigmoid", "relu"] = "softmax"
    query_norm: Literal["batch", "layer", "none"] = "batch"
    query_norm_epsilon: Positive | None = None
    shared_keys: bool = True
    momentum: Rate = 0.9
    key_std: NonNegative = 0.02
    implementation: str = "auto"

    def __post_init__(self) -> None:
        if self.query_dim % 2:
            raise ConfigError(f"query_dim={self.query_dim} must be even: a query has two halves")
        if self.k > self.num_keys**2:
            raise ConfigError(f"k={self.k} exceeds the num_keys={self.num_keys} squared experts; lower k or add keys")
        check_choice("implementation", self.implementation, ("auto", *IMPLEMENTATIONS))
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"], ctx: Context | None = None) -> Float[Array, "b s d"]:
        """Padding gets zeros."""
        ctx = ctx or Context()
        b, s, _ = ctx.fit(x)
        check_platform(self.implementation, self)
        rows, valid = ctx.clean(x).reshape(-1, x.shape[-1]), ctx.real(x).reshape(-1)
        score, index = self._retrieve(self._query(rows, valid, ctx.train))
        weight = SCORES[self.score](score)
        self._count(index, weight, valid, ctx.train)
        weight = jnp.where(valid[:, None, None], weight, 0)
        # As wide as the network of heads * k units that a token puts together; values by their own width.
        fan_in = x.shape[-1] if self.values_only else self.heads * self.k
        bank = RankOne(self.num_keys**2, self.activation, self.values_only, fan_in**-0.5, self.implementation, name="bank")
        y = bank(rows, index.reshape(rows.shape[0], -1), weight.reshape(rows.shape[0], -1))
        expert, share = (values.reshape(b, s, -1) for values in (index, weight))
        used = jnp.broadcast_to(ctx.real(x)[..., None], expert.shape)
        sow(self, "routing", "plan", dropless(expert, share, used, self.num_keys**2))
        return y.reshape(x.shape).astype(x.dtype)

    def _query(self, x: Float[Array, "n d"], valid: Bool[Array, "n"], train: bool) -> Float[Array, "n h q"]:
        """Normalised queries, float32 like everything that decides who is chosen."""
        width = self.heads * self.query_dim
        w = param(self, "query", nn.initializers.lecun_normal(), (x.shape[-1], width), ("embed", None))
        query = jnp.einsum("nd,dq->nq", x.astype(jnp.float32), w, precision=jax.lax.Precision.HIGHEST)
        if self.query_norm == "batch":
            query = self._batch_norm(query, valid, train)
        query = query.reshape(-1, self.heads, self.query_dim)
        return nn.LayerNorm(self._epsilon, name="query_norm")(query) if self.query_norm == "layer" else query

    @property
    def _epsilon(self) -> float:
        usual = 1e-5 if self.query_norm == "batch" else 1e-6
        return usual if self.query_norm_epsilon is None else self.query_norm_epsilon

    def _batch_norm(self, query: Float[Array, "n q"], valid: Bool[Array, "n"], train: bool) -> Float[Array, "n q"]:
        width = query.shape[-1]
        scale = param(self, "scale", nn.initializers.ones, (width,), (None,))
        shift = param(self, "shift", nn.initializers.zeros, (width,), (None,))
        now = self.variable("router_state", "query", lambda: {"mean": jnp.zeros(width), "var": jnp.ones(width)}).value
        if train:
            share = valid[:, None] / jnp.maximum(valid.sum(), 1)
            mean = (share * query).sum(0)
            now = {"mean": mean, "var": (share * jnp.square(query - mean)).sum(0)}
            seen = jax.tree.map(lambda value: value * valid.sum(), now)
            control(self, "query", Follow("query", self.momentum), {"count": valid.sum().astype(jnp.float32), **seen})
        return (query - now["mean"]) * jax.lax.rsqrt(now["var"] + self._epsilon) * scale + shift

    def _retrieve(self, query: Float[Array, "n h q"]) -> tuple[Float[Array, "n h k"], Int[Array, "n h k"]]:
        n, h, q = query.shape
        own = 1 if self.shared_keys else h
        shape = (own, 2, self.num_keys, q // 2)
        keys = param(self, "keys", nn.initializers.normal(self.key_std), shape, (None, None, None, None))
        # Heads with common keys are so many more tokens.
        halves = query.reshape(n * h // own, own, 2, q // 2)

        def top_k(keys: Array, halves: Array) -> tuple[Array, Array]:
            return product_key_top_k(halves, keys, self.k, self.implementation)

        score, index = by_device(top_k, keys, PartitionSpec(), halves)
        return score.reshape(n, h, self.k), index.reshape(n, h, self.k)

    def _count(self, index: Int[Array, "n h k"], weight: Float[Array, "n h k"], valid: Bool[Array, "n"], train: bool) -> None:
        """Follows each expert's share of the weights, and sows what the shares look like."""
        e, weight = self.num_keys**2, jax.lax.stop_gradient(weight)
        usage = self.variable("router_state", "usage", lambda: {"weight": jnp.zeros(e)}).value["weight"]
        if train:
            spent = jnp.where(valid[:, None, None], weight, 0)
            seen = {"count": spent.sum(), "weight": jnp.zeros(e).at[index].add(spent)}
            control(self, "usage", Follow("usage", self.momentum), seen)
        share = usage / jnp.maximum(usage.sum(), 1e-9)
        sow(self, "stats", "usage", (share > 0).mean())
        sow(self, "stats", "unevenness", jax.scipy.special.xlogy(share, share * e).sum())
        own = weight / jnp.maximum(weight.sum(-1, keepdims=True), 1e-9)
        entropy = -jax.scipy.special.xlogy(own, own).sum(-1).mean(-1)
        sow(self, "stats", "entropy", jnp.where(valid, entropy, 0).sum() / jnp.maximum(valid.sum(), 1))

    def active_fraction(self) -> float:
        """Share of the experts that a token uses."""
        return min(1.0, self.heads * self.k / self.num_keys**2)
