"""Soft merging of experts by sequence (SMEAR, Muqeeth et al. 2023), and the ways of choosing among experts that it is compared with."""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.core.fields import Count, NonNegative, Positive, Rate
from moejax.core.layer import Layer
from moejax.core.params import param
from moejax.core.registry import Many
from moejax.dispatch import Backend
from moejax.experts.base import AnyBank, experts_of
from moejax.experts.registry import banks
from moejax.layers.registry import ffns, mixers
from moejax.layers.routed import run_plan, sow_routing
from moejax.routing.losses.base import Loss, Routing, losses, masked_mean
from moejax.routing.plan import MergePlan, Plan, dropless
from moejax.routing.scores import shares

SLOTS = {"bank": banks, "losses": Many(losses)}


@mixers.register("smear", slots={**SLOTS, "layer": mixers})
@ffns.register("smear", slots={**SLOTS, "layer": ffns})
class SMEAR(Layer):
    """`u + LN(E(u))` with u the output of `layer` and E one expert whose parameters are averaged for each sequence: `sum_i p_i theta_i`.

    `p = softmax(LN(mean of u) . LN(router_i))`. The router's vectors are normalised to a small scale, so that p starts near uniform.
    Gradients are exact, and no balance loss is needed. Without `layer`, E itself is the layer (`y = E(x)`).

    The mean over a sequence is taken of valid tokens, and sees the future: a decoder must route segment by segment, by what came before.

    Attributes:
      bank: the experts.
      num_experts: e.
      layer: the sub-layer that experts refine: a feed-forward layer, or a mixer where this stands for one.
      combine: 'merge' parameters (SMEAR); run all experts and mix outputs ('ensemble'); one expert: sampled, with the
        straight-through gradient of a Gumbel-softmax ('st_gumbel'), the most probable, weighted by its probability ('top1'), or
        that of the first token's domain, modulo e ('tag').
      route_by: p of a whole 'sequence'; of a segment, from the mean of the 'previous' segment or of the first one ('prefix'). The first
        segment then has a learned p of its own.
      segment: tokens of a segment; a packed row is cut regardless of its documents.
      expert_dropout: in training each p_i is zeroed with this probability, and p normalised again ('merge' and 'ensemble').
      epsilon: of the norms LN, added to the variance.
      router_scale: of the router's normalised vectors at the start.
      temperature: of the Gumbel-softmax.
      losses: on p, one per group.
      backend: of dispatch.

    Raises:
      ConfigError: unknown options; in a decoder, `route_by='sequence'`; a 'tag' without domains in the batch.
    """

    bank: AnyBank
    num_experts: Count
    layer: nn.Module | None = None
    combine: Literal["merge", "ensemble", "st_gumbel", "top1", "tag"] = "merge"
    route_by: Literal["sequence", "previous", "prefix"] = "sequence"
    segment: Count = 16
    expert_dropout: Rate = 0.1
    router_scale: NonNegative = 1e-2
    temperature: Positive = 1.0
    epsilon: Positive = 1e-6
    losses: tuple[Loss, ...] = ()
    backend: Backend = "auto"

    @property
    def counts_padding(self) -> bool:
        """Segments are cut by places."""
        return self.route_by != "sequence"

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"], ctx: Context | None = None) -> Float[Array, "b s o"]:
        ctx = ctx or Context()
        ctx.fit(x)
        u = x if self.layer is None else self.layer(x, ctx)
        b, s, d = u.shape
        groups, valid = self._grouped(ctx.clean(u), ctx.real(u))
        logits = self._logits(self._summaries(groups, valid))
        domain = None if ctx.domain is None else self._grouped(ctx.domain[..., None], ctx.domain > 0)[0][:, :, 0, 0].reshape(-1)
        flat, valid = groups.reshape(-1, *groups.shape[2:]), valid.reshape(-1, groups.shape[2])
        probs = jax.nn.softmax(logits, axis=-1)
        plan = self._plan(logits, probs, domain, valid, ctx.train)
        experts = experts_of(self.bank, flat.shape[-1], ctx)
        y, _, backend = run_plan(_for_tokens(plan, valid), experts, flat, self.backend)
        y = jnp.where(valid[..., None], y, 0).reshape(b, -1, y.shape[-1])[:, :s].astype(x.dtype)
        # What is routed is a group: losses and statistics see one token in each.
        sow_routing(
            self, Routing(logits[:, None], probs[:, None], plan, valid.any(1, keepdims=True)), self.losses, backend=backend
        )
        return y if self.layer is None else u + nn.LayerNorm(self.epsilon, dtype=x.dtype, name="post_norm")(y)

    def _grouped(
        self, u: Float[Array, "b s d"] | Int[Array, "b s d"], valid: Bool[Array, "b s"]
    ) -> tuple[Array, Bool[Array, "b c n"]]:
        """`[b, c, n, d]`: the c groups of each sequence; a last segment is filled up with padding."""
        b, s, d = u.shape
        n = s if self.route_by == "sequence" else min(self.segment, s)
        u, valid = jnp.pad(u, ((0, 0), (0, -s % n), (0, 0))), jnp.pad(valid, ((0, 0), (0, -s % n)))
        return u.reshape(b, -1, n, d), valid.reshape(b, -1, n)

    def _summaries(self, groups: Float[Array, "b c n d"], valid: Bool[Array, "b c n"]) -> Float[Array, "g d"]:
        """What each group is routed by: a mean that it may see, or zeros."""
        b, c, n, d = groups.shape
        means = masked_mean(groups.reshape(b * c, n, d).astype(jnp.float32), valid.reshape(b * c, n), (1,)).reshape(b, c, d)
        if self.route_by == "sequence":
            return means[:, 0]
        before = means[:, :-1] if self.route_by == "previous" else jnp.broadcast_to(means[:, :1], (b, c - 1, d))
        return jnp.concatenate([jnp.zeros((b, 1, d)), before], axis=1).reshape(b * c, d)

    def _logits(self, summaries: Float[Array, "g d"]) -> Float[Array, "g e"]:
        shape = (self.num_experts, summaries.shape[-1])
        router = param(self, "router", nn.initializers.normal(0.02), shape, (None, "embed"), role="routers")
        small = nn.initializers.constant(self.router_scale)
        router = nn.LayerNorm(self.epsilon, use_bias=False, scale_init=small, name="router_norm")(router)
        summaries = nn.LayerNorm(self.epsilon, name="summary_norm")(summaries)
        return jnp.einsum("gd,ed->ge", summaries, router, precision=jax.lax.Precision.HIGHEST)

    def _plan(
        self, logits: Array, probs: Float[Array, "g e"], domain: Int[Array, "g"] | None, valid: Bool[Array, "g n"], train: bool
    ) -> Plan:
        """The plan of groups: of one token each, for token choice."""
        if self.combine in ("merge", "ensemble"):
            weight = probs
            if train and self.expert_dropout:
                weight = drop_experts(probs, self.expert_dropout, self.make_rng("router"))
            if self.combine == "merge":
                return MergePlan(weight)
            expert = jnp.broadcast_to(jnp.arange(self.num_experts), probs.shape)
        elif self.combine == "tag":
            if domain is None:
                raise ConfigError(
                    f"combine='tag' in {'/'.join(self.path)} needs the batch's domains; use another way to combine"
                )
            expert, weight = (domain % self.num_experts)[:, None], jnp.ones((domain.shape[0], 1))
        else:
            gumbel = self.combine == "st_gumbel"
            noise = jax.random.gumbel(self.make_rng("router"), logits.shape) if gumbel and train else 0.0
            soft = jax.nn.softmax((logits + noise) / self.temperature, axis=-1) if gumbel else probs
            expert = jnp.argmax(soft, axis=-1)[:, None]
            weight = jnp.take_along_axis(soft, expert, axis=-1)
            weight = 1 + weight - jax.lax.stop_gradient(weight) if gumbel else weight
        used = jnp.broadcast_to(valid.any(1)[:, None, None], (*expert.shape[:1], 1, expert.shape[1]))
        expert = expert[:, None].astype(jnp.int32)
        return dropless(expert, weight[:, None], used, self.num_experts)

    def active_fraction(self) -> float:
        """One expert's share, for however many it is made of; all of them where all run."""
        return 1.0 if self.combine == "ensemble" else 1 / self.num_experts

    def check_causal(self, where: str) -> None:
        """Raises ConfigError if a token's expert depends on later tokens."""
        if self.route_by == "sequence" and self.combine != "tag":
            raise ConfigError(
                f"{where}.route_by='sequence' routes by the mean of the whole sequence and leaks the future in a decoder; set it to "
                "'previous' or 'prefix'"
            )

    def decodable(self) -> str | None:
        """None if decoding one token at a time gives the plan of a whole forward pass; else the reason why not."""
        return None if self.num_experts == 1 else "experts are merged for whole segments, whose means no cache holds"


def drop_experts(probs: Float[Array, "g e"], rate: float, key: Key[Array, ""]) -> Float[Array, "g e"]:
    """Zeroes each entry with probability `rate` and normalises again; uniform where none is left."""
    kept = jnp.where(jax.random.bernoulli(key, 1 - rate, probs.shape), probs, 0)
    return shares(jnp.where(kept.any(-1, keepdims=True), kept, 1.0))


def _for_tokens(plan: Plan, valid: Bool[Array, "g n"]) -> Plan:
    """The plan in which every valid token of a group does what the group does."""
    if isinstance(plan, MergePlan):
        return plan
    shape = (*valid.shape, plan.expert.shape[-1])
    expert, weight, used = (jnp.broadcast_to(a, shape) for a in (plan.expert, plan.weight, plan.used))
    return plan.replace(expert=expert, weight=weight, used=used & valid[..., None], dropped=jnp.zeros(shape, bool))
