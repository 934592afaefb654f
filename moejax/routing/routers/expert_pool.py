"""DynMoE's router (Guo et al. 2024): cosine scores against learned thresholds, over a pool of experts that grows and shrinks."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moejax.core.context import Context
from moejax.core.control import Site, control
from moejax.core.errors import ConfigError
from moejax.core.fields import Count, Positive, Whole
from moejax.core.layer import RowWise
from moejax.core.params import param
from moejax.core.sowing import sow
from moejax.routing.routers.base import Router, routers

_MAX_SCALE = math.log(100.0)
_OUTSIDE = -1e9


@dataclasses.dataclass(frozen=True)
class AdaptPool:
    """Once a cycle, removes the experts that nobody chose and adds one for the tokens that chose nobody.

    While recording, counts each expert's tokens and sums the tokens x that no expert took. At the update: experts without tokens
    leave the pool; then, if any token was left alone and a slot is free, the first free slot joins with that sum, at length 1,
    as its embedding, with threshold 0, and with fresh optimizer memory of both. The slot's expert keeps its parameters.

    Attributes:
      cycle: steps of a cycle.
      record: steps of it before recording begins.
      update: the step of it at which the pool changes; recording ends there.
    """

    cycle: int
    record: int
    update: int

    def after_step(self, site: Site) -> Site:
        phase = (site.step - 1) % self.cycle + 1
        recording = (phase > self.record) & (phase <= self.update)
        seen = {name: site.state[name] + jnp.where(recording, site.measured[name], 0) for name in site.measured}
        due = phase == self.update
        kept = site.state["active"] & (seen["chosen"] > 0)
        lost = seen["lost"]
        joins = (jnp.cumsum(~kept) == 1) & ~kept & (seen["alone"] > 0)
        joined = due & joins
        embedding = lost / (jnp.linalg.norm(lost) + 1e-9)
        w, threshold = site.params["w"], site.params["threshold"]
        return site.replace(
            params={
                **site.params,
                "w": jnp.where(joined, embedding[:, None].astype(w.dtype), w),
                "threshold": jnp.where(joined, 0, threshold),
            },
            # What was recorded is forgotten at the update, and lies idle (at 0) until recording begins again.
            state={
                **{name: jnp.where(due, 0, value) for name, value in seen.items()},
                "active": jnp.where(due, kept | joins, site.state["active"]),
            },
            restarted={"w": joined[None], "threshold": joined},
        )


@routers.register("expert_pool")
class ExpertPool(Router, RowWise):
    """`score_e = sigmoid(c cos(x, w_e))` and `threshold_e = sigmoid(c G_e)` for the experts of the pool; for select rule `top_any`.

    An expert outside the pool has the score -1, which no token takes. For rules that read other than two logits of each expert,
    these are `c (cos(x, w_e) - G_e)`, above 0 where the score passes its threshold, or -1e9, and null experts have 0. Sows `diversity * (|| M * (W^T W - I) ||_F + mean_e ||w_e||)`,
    with unit columns in `W^T W` and M the pairs inside the pool: unlike embeddings, of small length (the paper's auxiliary loss).
    Sows the statistic `pool_size`.

    Attributes:
      num_experts: slots e, the largest pool.
      initial: experts of the pool at the start; None for all.
      scale_init: c at the start; the learned temperature log(c) is clamped at log(100).
      learn_scale: False keeps c as it starts (the release for vision-language models: 1).
      diversity: weight of the auxiliary loss.
      cycle, record, update: see `AdaptPool`; a cycle of 0 keeps the pool as it starts. By default recording begins after a third
        of a cycle and the update comes after two thirds, as in the release.
    """

    outputs: tuple[Count, Whole] = dataclasses.field(default=(2, 0), kw_only=True)
    initial: Count | None = None
    scale_init: Positive = 10.0
    learn_scale: bool = True
    diversity: float = 0.01
    cycle: Whole = 0
    record: Whole | None = None
    update: Count | None = None

    def __post_init__(self) -> None:
        if self.initial is not None and self.initial > self.num_experts:
            raise ConfigError(f"initial={self.initial} must lie between 1 and num_experts={self.num_experts}")
        if self.cycle and not self._adapt.record < self._adapt.update <= self.cycle:
            raise ConfigError(
                f"record={self.record} and update={self.update} must satisfy record < update <= cycle={self.cycle}"
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Float[Array, "g n d"], ctx: Context) -> Float[Array, "g n o"]:
        e, d = self.num_experts, x.shape[-1]
        w = param(self, "w", nn.initializers.orthogonal(), (d, e), ("embed", None))
        threshold = param(self, "threshold", nn.initializers.zeros, (e,), (None,))
        scale = jnp.float32(self.scale_init)
        if self.learn_scale:
            start = nn.initializers.constant(math.log(self.scale_init))
            scale = jnp.exp(jnp.minimum(param(self, "temperature", start, (), ()), _MAX_SCALE))
        active = self.variable("router_state", "active", lambda: jnp.arange(e) < (self.initial or e)).value

        x = x.astype(jnp.float32)
        unit = _unit(w.astype(jnp.float32), 0)
        cosine = jnp.einsum("gnd,de->gne", _unit(x, -1), unit, precision=jax.lax.Precision.HIGHEST)
        score = jnp.where(active, jax.nn.sigmoid(scale * cosine), -1)
        limit = jnp.broadcast_to(jax.nn.sigmoid(scale * threshold), score.shape)

        sow(self, "stats", "pool_size", active.sum().astype(jnp.float32))
        if self.diversity:
            sow(self, "losses", "diversity_loss", self.diversity * _likeness(unit, active) + self.diversity * _length(w))
        if self.cycle:
            self._record(x, score > limit, ctx)
        each, null = self.outputs
        if each == 2:
            logits = jnp.stack([score, limit], axis=-1).reshape(*x.shape[:2], 2 * e)
        else:
            logits = jnp.repeat(jnp.where(active, scale * (cosine - threshold), _OUTSIDE), each, axis=-1)
        return jnp.pad(logits, ((0, 0), (0, 0), (0, null)))

    def _record(self, x: Float[Array, "g n d"], taken: Bool[Array, "g n e"], ctx: Context) -> None:
        x, valid = ctx.clean(x), ctx.real(x)
        alone = (valid & ~taken.any(-1)).astype(jnp.float32)
        measured = {
            "chosen": (taken & valid[..., None]).sum((0, 1)).astype(jnp.float32),
            "lost": jnp.einsum("gn,gnd->d", alone, x),
            "alone": alone.sum(),
        }
        for name, value in measured.items():
            self.variable("router_state", name, jnp.zeros, value.shape)
        control(self, "pool", self._adapt, measured)

    @property
    def _adapt(self) -> AdaptPool:
        third = self.cycle // 3
        return AdaptPool(
            self.cycle,
            third if self.record is None else self.record,
            2 * third if self.update is None else self.update,
        )


def _unit(x: Array, axis: int) -> Array:
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis, keepdims=True) + 1e-12)


def _likeness(unit: Float[Array, "d e"], active: Bool[Array, "e"]) -> Float[Array, ""]:
    pairs = active[:, None] & active
    gram = jnp.einsum("de,df->ef", unit, unit, precision=jax.lax.Precision.HIGHEST)
    # Embeddings start orthogonal, where a norm has no derivative; the small number gives it 0.
    return jnp.sqrt(jnp.square(jnp.where(pairs, gram - jnp.eye(len(active)), 0)).sum() + 1e-12)


def _length(w: Float[Array, "d e"]) -> Float[Array, ""]:
    return jnp.sqrt(jnp.square(w).sum(0) + 1e-12).mean()
