"""LoRA: a matrix of low rank beside a frozen one (Hu et al. 2021), one for all tokens or a routed mixture of several."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.core.fields import Count, Rate, Whole
from moejax.core.layer import Layer, RowWise
from moejax.core.params import param, per_expert
from moejax.core.paths import matches
from moejax.dispatch import Backend
from moejax.experts.base import AnyBank
from moejax.experts.low_rank import LowRank
from moejax.experts.registry import dropout
from moejax.layers.adapters.base import Adapter, Site, as_tokens
from moejax.layers.adapters.stack import LowRankSum
from moejax.layers.ffn.moe import SLOTS, MoE
from moejax.layers.registry import adapters
from moejax.routing.balancers import Balancer
from moejax.routing.losses.base import Loss
from moejax.routing.routers.base import AnyRouter
from moejax.routing.routers.linear import Linear
from moejax.routing.select import Select, TopK

# Kaiming-uniform with a = sqrt(5), as in the reference implementation: U(-1/sqrt(d), 1/sqrt(d)).
_UNIFORM = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
_ZEROS = nn.initializers.zeros


class LowRankAdapter(Adapter, RowWise):
    """`y = layer(x) + scale * (g * (x A)) B` with `A[d, r]` and `B[r, o]`; B starts at zero, so nothing changes at the start.

    g is a mask of ranks, all ones here. A kind in which ranks come and go, by token or by what was learnt, is a class with its own
    `gate`; one that starts A and B otherwise, or does not train them, has its own `factors`; one in which the scale follows the rank
    has its own `multiplier`.

    Attributes:
      rank: r; or glob patterns of paths, each with the rank of the matrices that it matches, the first that does.
      scale: explicit, since repositories divide alpha by total, active, per-expert or initial rank.
      dropout: rate on x on its way into A, in training.
      ranks: of each expert of a bank, at most `rank`; 0 leaves an expert as it is. None gives all of them `rank`.
    """

    rank: Count | Mapping[str, Whole] | None = None
    scale: float | None = None
    dropout: Rate = 0.0
    ranks: tuple[Whole, ...] | None = None

    def __post_init__(self) -> None:
        if self.rank is None or self.scale is None:
            raise ConfigError(f"{type(self).__name__} needs a rank and a scale: alpha / rank in most papers, and never implied")
        super().__post_init__()

    def weight(self, w: Float[Array, "d o"], site: Site, ctx: Context | None = None) -> Float[Array, "d o"]:
        """`W + scale * A B`."""
        if type(self).gate is not LowRankAdapter.gate:
            raise self.no_matrix(site)
        a, b = self.factors(site)
        return w + self.multiplier(site) * jnp.matmul(a, b, precision="highest").astype(w.dtype)

    def linear(self, x: Array, site: Site, ctx: Context | None = None) -> Array:
        """Through the narrow middle, in the dtype of the layer's output."""
        y = site.call(x)
        rows = self.dropped(site.rows(x).astype(y.dtype), ctx)
        a, b = (factor.astype(y.dtype) for factor in self.factors(site))
        h = rows @ a
        g = self.gate(h, rows, site, ctx)
        h = h if g is None else h * g.astype(h.dtype)
        return y + site.put(self.multiplier(site) * (h @ b))

    def stack(self, w: Any, site: Site, ctx: Context | None = None) -> LowRankSum:
        """One pair of factors for each expert, each of its own rank."""
        if type(self).gate is not LowRankAdapter.gate:
            raise self.no_matrix(site)
        (e, d, o), (expert, inner, outer), r = site.shape, site.axes, self.rank_at(site)
        a = param(self, "a", per_expert(_UNIFORM), (e, d, r), (expert, inner, "rank"))
        b = param(self, "b", _ZEROS, (e, r, o), (expert, "rank", outer))
        if self.ranks is not None:
            a = a * self._mask(e, r, site)[:, None]
        return (w if isinstance(w, LowRankSum) else LowRankSum(w)).plus(a, self.multiplier(site) * b, inner, outer)

    def factors(self, site: Site) -> tuple[Float[Array, "d r"], Float[Array, "r o"]]:
        """A and B of a matrix `[d, o]`. Of a table, whose rows are looked up, A is what starts at zero, as in the reference code."""
        (d, o), (inner, outer), r = site.shape, site.axes, self.rank_at(site)
        start = (_ZEROS, nn.initializers.normal(1.0)) if site.table else (_UNIFORM, _ZEROS)
        a = param(self, "a", start[0], (d, r), (inner, "rank"))
        return a, param(self, "b", start[1], (r, o), ("rank", outer))

    def gate(
        self, h: Float[Array, "*b r"], rows: Float[Array, "*b d"], site: Site, ctx: Context | None
    ) -> Float[Array, "*b r"] | Float[Array, "r"] | None:
        """The mask of ranks for these rows; None for all of them. `h` is `rows @ A`."""
        return None

    def multiplier(self, site: Site) -> float:
        """What the product of A and B is multiplied by."""
        return self.scale

    def rank_at(self, site: Site) -> int:
        """r of this matrix."""
        if not isinstance(self.rank, Mapping):
            return self.rank
        for pattern, rank in self.rank.items():
            if matches(site.path, pattern):
                return rank
        raise ConfigError(f"rank={dict(self.rank)} gives no rank for {site.path}; add a pattern that matches it, such as '*'")

    def _mask(self, e: int, r: int, site: Site) -> Float[np.ndarray, "e r"]:
        if len(self.ranks) != e or max(self.ranks) > r or min(self.ranks) < 0:
            raise ConfigError(f"ranks={self.ranks} must be {e} numbers from 0 to rank={r}, one for each expert of {site.path}")
        return (np.arange(r) < np.array(self.ranks)[:, None]).astype(np.float32)

    def dropped(self, rows: Float[Array, "*b d"], ctx: Context | None) -> Float[Array, "*b d"]:
        """`rows` with dropout, in training."""
        if not self.dropout or ctx is None or not ctx.train:
            return rows
        return dropout(rows, self.dropout, self.make_rng("dropout"))


@adapters.register("lora", slots=SLOTS)
class LoRA(LowRankAdapter):
    """LoRA around linear layers, embeddings, heads and banks of experts; around linear layers also a routed mixture of several:

    `y = layer(x) + scale * sum_e weight_e(x) (x A_e) B_e`, the sum over each token's plan (Zadouri et al. 2023, and kin).

        model = Adapted(model, {"main": LoRA(rank=8, scale=2.0, targets=("*/q", "*/v"))})
        model = Adapted(model, {"main": LoRA(rank=8, scale=2.0, num_experts=4, select=TopK(k=2), targets=("mixers",))})

    Attributes (and those of `LowRankAdapter`):
      num_experts: e; with 1, plain LoRA without a router.
      router: 'linear' if left out.
      select: any select rule; if left out a softmax over all experts, every expert used (a soft mixture).
      bank: any bank instead of the low-rank one, which takes `rank` and `scale`; it should start as zero.
      eval_select, losses, balancer, backend: as in `MoE`.
    """

    num_experts: Count = 1
    router: AnyRouter | None = None
    select: Select | None = None
    eval_select: Select | None = None
    bank: AnyBank | None = None
    losses: tuple[Loss, ...] = ()
    balancer: Balancer | None = None
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        routed = ("router", "select", "eval_select", "bank", "losses", "balancer")
        given = [name for name in routed if getattr(self, name) not in (None, ())]
        if self.num_experts == 1 and given:
            raise ConfigError(f"num_experts=1 is plain LoRA, which has no {given[0]}; set num_experts to the number of experts")
        if self.bank is not None and (self.rank, self.scale) != (None, None):
            raise ConfigError("rank and scale are those of the low-rank bank; leave them out beside a bank of your own")
        if self.bank is not None and not hasattr(self.bank, "features"):
            raise ConfigError(
                f"bank={type(self.bank).__name__} has no output width to choose; take one with a field 'features'"
            )
        if self.bank is not None and self.dropout:
            raise ConfigError(f"dropout={self.dropout} is that of the low-rank bank; set it in a bank of your own")
        if self.bank is None:
            super().__post_init__()
        else:
            Adapter.__post_init__(self)
        if self.router is not None and self.router.carries(1, 1):
            raise ConfigError(f"{type(self.router).__name__} remembers what earlier layers left, and adapters pass nothing on")

    def weight(self, w: Float[Array, "d o"], site: Site, ctx: Context | None = None) -> Float[Array, "d o"]:
        """`W + scale * A B` of plain LoRA. A mixture has none."""
        if self.num_experts > 1:
            raise self.no_matrix(site)
        return super().weight(w, site, ctx)

    def linear(self, x: Array, site: Site, ctx: Context | None = None) -> Array:
        """As a routed layer beside the frozen one."""
        if self.num_experts == 1:
            return super().linear(x, site, ctx)
        y = site.call(x)
        rows = site.rows(x).astype(y.dtype)
        tokens, ctx = as_tokens(rows, ctx)
        mixture = self._mixture(site).clone(parent=self, name="moe")
        return y + site.put(mixture(tokens, ctx).reshape(*rows.shape[:-1], -1).astype(y.dtype))

    def stack(self, w: Any, site: Site, ctx: Context | None = None) -> LowRankSum:
        """Beside every expert's own matrix, of plain LoRA."""
        if self.num_experts > 1:
            raise self.no_matrix(site)
        return super().stack(w, site, ctx)

    def check_causal(self, where: str) -> None:
        """Raises ConfigError if a token's choice of experts may depend on later tokens."""
        if self.num_experts > 1:
            self._mixture().check_causal(where)
        for name in ("router", "bank"):
            part = getattr(self, name)
            if part is not None:
                # A part that is no Layer does not say, and is refused like one that says nothing.
                (type(part) if isinstance(part, Layer) else Layer).check_causal(part, f"{where}.{name}")

    def decodable(self) -> str | None:
        """None if decoding one token at a time makes the choices of a whole forward pass; else the reason why not."""
        return self._mixture().decodable() if self.num_experts > 1 else None

    def active_fraction(self) -> float:
        """Share of the experts' parameters that a token uses, on average at most."""
        return self._mixture().active_fraction() if self.num_experts > 1 else 1.0

    def _mixture(self, site: Site | None = None) -> MoE:
        """The routed layer beside the frozen one; of any size where only questions are asked of it."""
        e, features = self.num_experts, site.shape[-1] if site else 1
        if self.bank is None:
            rank, scale = (self.rank_at(site), self.multiplier(site)) if site else (1, 1.0)
            experts = LowRank(rank, features, num_experts=e, scale=scale, dropout=self.dropout, parent=None)
        else:
            experts = self.bank.copy(features=features, parent=None)
        router = Linear(e, parent=None) if self.router is None else self.router.copy(parent=None)
        return MoE(
            router=router,
            select=self.select or TopK(k=e),
            bank=experts,
            eval_select=self.eval_select,
            losses=self.losses,
            balancer=self.balancer,
            backend=self.backend,
            parent=None,
        )
