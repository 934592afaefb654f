"""A mixture whose number of experts per token is decided after training, layer by layer (LExI, Chitty-Venkata et al. 2025)."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.core.context import Context
from moejax.core.control import control
from moejax.core.errors import ConfigError
from moejax.experts.base import experts_of
from moejax.layers.ffn.dense import sum_shared
from moejax.layers.ffn.moe import SLOTS, MoE
from moejax.layers.registry import ffns
from moejax.layers.routed import group_tokens, plan_tokens, run_plan, sow_routing, ungroup_tokens
from moejax.routing.plan import TokenPlan
from moejax.routing.routers.base import ask
from moejax.routing.select.base import TokenChoice

STATE = "k"


@ffns.register("allotted", slots=SLOTS)
class AllottedMoE(MoE):
    """A `MoE` in which a token uses the first `k` of the experts that it chooses; `k` is state, one number for each layer.

    It is kept in 'router_state', so that it is saved with the parameters, differs between the layers of a scanned stack, and can be
    written by a surgery (`moejax.surgery.Allot`); nothing else changes it. It starts as the rule's own k, with which the layer is the
    `MoE` of the same fields and parameters. Weights are what the rule gives to the experts in use: it renormalises if it normalises.
    Buffers have room for the rule's k.

    Raises:
      ConfigError: a rule under which a token does not take its `k` best experts.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, rule in (("select", self.select), ("eval_select", self.eval_select)):
            if rule is not None and not (hasattr(rule, "k") and type(rule).widest is not TokenChoice.widest):
                raise ConfigError(
                    f"{name} of an allotted mixture must be a rule under which a token takes its k best experts, such as 'top_k', not "
                    f"{type(rule).__name__}"
                )

    @property
    def most(self) -> int:
        """The largest k outside training: the rule's own."""
        return (self.eval_select or self.select).k

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"], ctx: Context | None = None) -> Float[Array, "b s o"]:
        """As `MoE`."""
        ctx = ctx or Context()
        b, s, _ = ctx.fit(x)
        tokens, grouped_ctx = group_tokens(x, ctx, self.group_by)
        select = self.select if ctx.train or self.eval_select is None else self.eval_select
        k = self.variable("router_state", STATE, lambda: jnp.int32(self.most)).value
        logits = ask(self.router, tokens, grouped_ctx)
        rule = AtMost(select, k)
        routing = plan_tokens(self, logits, rule, self.bank.num_experts, grouped_ctx, self._selection_bias())
        experts = experts_of(self.bank, tokens.shape[-1], ctx)
        y, plan, backend = run_plan(routing.plan, experts, tokens, self.backend, self.group_by)
        routing = routing.replace(plan=plan)
        sow_routing(self, routing, self.losses, backend=backend)
        if self.balancer is not None and ctx.train:
            control(self, "balancer", self.balancer, self.balancer.measure(routing))
        y = ungroup_tokens(y, b, s, self.group_by).astype(x.dtype)
        return y if self.shared is None else y + sum_shared(self.shared, x, ctx)


@dataclasses.dataclass(frozen=True, eq=False)
class AtMost(TokenChoice):
    """The first `count` choices of the rule `select`, which may be data: a rule for the length of one call."""

    select: TokenChoice
    count: Int[Array, ""]

    @property
    def needs(self) -> tuple[str, ...]:
        return self.select.needs

    @property
    def outputs_per_expert(self) -> int:
        return self.select.outputs_per_expert

    @property
    def null_outputs(self) -> int:
        return self.select.null_outputs

    def choose(
        self, logits: Float[Array, "g n o"], ctx: Context, bias: Float[Array, "b"] | None
    ) -> tuple[Int[Array, "g n k"], Bool[Array, "g n k"]]:
        expert, wanted = self.select.choose(logits, ctx, bias)
        return expert, wanted & (jnp.arange(expert.shape[-1]) < self.count)

    def accepts(self, logits: Float[Array, "g n o"], expert: Int[Array, "g n k"], ctx: Context) -> Bool[Array, "g n k"]:
        return self.select.accepts(logits, expert, ctx)

    def assemble(
        self, logits: Float[Array, "g n o"], expert: Int[Array, "g n k"], wanted: Bool[Array, "g n k"], ctx: Context
    ) -> TokenPlan:
        return self.select.assemble(logits, expert, wanted, ctx)

    def widest(self, num_experts: int) -> TokenChoice:
        return self.select.widest(num_experts)

    def probabilities(self, logits: Float[Array, "g n o"]) -> Float[Array, "g n e"]:
        return self.select.probabilities(logits)

    def check_num_experts(self, num_experts: int) -> None:
        self.select.check_num_experts(num_experts)
