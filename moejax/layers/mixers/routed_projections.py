"""Attention whose projections are mixtures of experts: "attention prototyping" (M6-T, Yang et al. 2021)."""

from typing import Literal

import flax.linen as nn
from jaxtyping import Array, Float

from moejax.core.context import Context
from moejax.core.errors import ConfigError, check_choice
from moejax.core.fields import Count
from moejax.core.params import Initializer, per_expert
from moejax.core.registry import Many
from moejax.dispatch.experts import Experts, Matrices
from moejax.dispatch.layout import Layout
from moejax.experts.base import Bank
from moejax.experts.registry import declare
from moejax.layers.ffn.moe import MoE
from moejax.layers.mixers.attention import INITS, Attention
from moejax.layers.registry import mixers
from moejax.routing.losses.base import Loss, losses
from moejax.routing.routers.base import check_num_experts, routers
from moejax.routing.routers.linear import Linear
from moejax.routing.select import Select, TopK, selects

PROJECTIONS = ("q", "k", "v", "o")


class LinearExperts(Bank):
    """`x W_e (+ b_e)`, with `W[e, d, features]`.

    Attributes:
      features: output width.
      num_experts: e.
      use_bias: adds a bias, which starts as 0.
      init_w: how each W_e starts.
    """

    features: int
    num_experts: int
    use_bias: bool
    init_w: Initializer

    @nn.compact
    def __call__(self, width: int, ctx: Context | None = None) -> Experts:
        e, f = self.num_experts, self.features
        shapes = {"w": (per_expert(self.init_w), (e, width, f), ("expert", "embed", None))}
        if self.use_bias:
            shapes["b"] = (nn.initializers.zeros, (e, f), ("expert", None))
        params, axes = declare(self, shapes)

        def expert(p: Matrices, x: Array, layout: Layout) -> Array:
            y = layout.dot(x, p["w"])
            return y + layout.take(p["b"]).astype(x.dtype) if "b" in p else y

        return Experts(expert, params, axes)


@mixers.register("routed_projections", slots={**INITS, "router": routers, "select": selects, "losses": Many(losses)})
class RoutedProjections(Attention):
    """`q = sum_i w_i x W_i` over a token's plan, likewise k, v and the output: attention with mixtures for its projections.

    Attention prototyping (Yang et al. 2021, "M6-T: Exploring Sparse Expert Models and Beyond", arXiv 2105.15082) is this with the
    rule `OnePerGroup`. Each projection is a `MoE` of its own, with a router of its own, under the projection's name: losses and
    statistics come once for each. A token that finds no expert with room has a zero there.

        layer = RoutedProjections(num_heads=4, num_experts=8, select=OnePerGroup(2), losses=(Balance(0.01),))
        y = layer.apply(variables, x, ctx)      # x[b, s, d] -> y[b, s, d]

    The other fields are those of `Attention`. Counts of active parameters take all of these experts for active.

    Attributes:
      num_experts: e, of each projection.
      select: which of them a token takes, and with which weight.
      router: makes the logits; each projection has one like it. A linear one by default.
      losses: on the routing of each projection.
      projections: which are mixtures: some of 'q', 'k', 'v' and 'o'. The others are plain.
      group_by: who competes for capacity, as in `MoE`.

    Raises:
      ConfigError: unknown projections or none, or parts that do not fit `num_experts`.
    """

    num_experts: Count = 8
    select: Select = TopK(k=1)
    router: nn.Module | None = None
    losses: tuple[Loss, ...] = ()
    projections: tuple[str, ...] = PROJECTIONS
    group_by: Literal["sequence", "batch", "position"] = "sequence"

    def __post_init__(self) -> None:
        self.select.check_num_experts(self.num_experts)
        check_num_experts(self.router, self)
        for name in self.projections:
            check_choice("projections", name, PROJECTIONS)
        if not self.projections:
            raise ConfigError("projections=() leaves plain attention; name some, or take kind 'attention'")
        super().__post_init__()

    def check_causal(self, where: str) -> None:
        """Raises ConfigError if the attention, or a mixture in it, looks at later tokens."""
        super().check_causal(where)
        self._mixture(1, "q", self.init_qkv).check_causal(where)

    def decodable(self) -> str | None:
        """None if decoding one token at a time gives what a whole forward pass gives; else the reason why not."""
        return super().decodable() or self._mixture(1, "q", self.init_qkv).decodable()

    def _linear(
        self, x: Float[Array, "b s d"], ctx: Context, features: int, axes: tuple[str, str], name: str, init: Initializer
    ) -> Float[Array, "b s f"]:
        if name not in self.projections:
            return super()._linear(x, ctx, features, axes, name, init)
        return self._mixture(features, name, init)(x.astype(self.dtype), ctx)

    def _mixture(self, features: int, name: str, init: Initializer) -> MoE:
        """The MoE of one projection, which owns its router and bank; outside of a call, one to ask."""
        router = (self.router or Linear(self.num_experts, parent=None)).clone(parent=None, name=None)
        bank = LinearExperts(features, self.num_experts, self._biased(name), init, parent=None)
        parent = {"parent": None} if self.scope is None else {}
        return MoE(router, self.select, bank, losses=self.losses, group_by=self.group_by, name=name, **parent)
