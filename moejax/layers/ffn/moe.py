"""The sparse mixture-of-experts layer: any router, any select rule, any bank."""

import warnings
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.core.context import Context
from moejax.core.control import control
from moejax.core.errors import ConfigError
from moejax.core.fields import Count
from moejax.core.layer import Layer
from moejax.core.registry import Given, Many
from moejax.dispatch import Backend
from moejax.experts.base import AnyBank, experts_of
from moejax.experts.registry import banks
from moejax.layers.ffn.dense import sum_shared
from moejax.layers.registry import ffns
from moejax.layers.routed import group_tokens, plan_tokens, run_plan, sow_routing, ungroup_tokens
from moejax.routing.balancers import STATE, Balancer, balancers
from moejax.routing.losses.base import Loss, losses
from moejax.routing.routers.base import AnyRouter, ask, check_num_experts, routers, told
from moejax.routing.select.base import Select, selects

SLOTS = {
    "router": routers,
    "select": selects,
    "eval_select": selects,
    "bank": banks,
    "shared": Given(banks, {"num_experts": 1}),
    "losses": Many(losses),
    "balancer": balancers,
}


_UNMOVED = (
    "{} of {} balances nothing in this call: name 'measured' in mutable=[...], and move 'router_state' after each step with "
    "moejax.after_step, as moejax.train does"
)


@ffns.register("moe", slots=SLOTS)
class MoE(Layer):
    """`y = sum of weight * expert(x)` over each token's plan, plus the shared experts.

        layer = MoE(Linear(8), TopK(k=2), GLU(hidden=512, num_experts=8), losses=(Balance(0.01), ZLoss(1e-3)))
        variables = layer.init(key, x)
        y, sown = layer.apply(variables, x, mutable=['losses', 'stats'])

    Attributes:
      router: tokens -> logits.
      select: logits -> plan.
      bank: the routed experts.
      eval_select: the rule outside training, for methods that select differently there; `select` by default.
      shared: a bank whose experts every token uses, with weight 1 (DeepSeekMoE); None for none.
      losses: balance and other routing losses, sown weighted into 'losses'.
      balancer: balances the load without a loss, by a bias on the selection that is kept in 'router_state'; None for none.
      backend: of dispatch; 'auto' or a name.
      group_by: who competes for capacity: tokens of one 'sequence', of the 'batch', or of one 'position'. Documents that are packed
        into one sequence compete too, see `moejax.routing.capacity`.
      leaky_training: accepts in a decoder that `select` looks at later tokens, in training only: `eval_select` must not (BASE layers).
      num_experts: only for configs, where it fills the router's and the bank's field of the same name (not the shared bank's,
        which is one expert unless its own spec says otherwise).

    Collections: sows 'losses' and 'stats' always, and 'routing' (logits and plan) when mutable; reads 'interventions' (see
    `moejax.layers.interventions`); keeps a balancer's bias in 'router_state', which it moves after every optimizer step.
    """

    router: AnyRouter
    select: Select
    bank: AnyBank
    eval_select: Select | None = None
    shared: AnyBank | None = None
    losses: tuple[Loss, ...] = ()
    balancer: Balancer | None = None
    backend: Backend = "auto"
    group_by: Literal["sequence", "batch", "position"] = "sequence"
    leaky_training: bool = False
    num_experts: Count | None = None

    def __post_init__(self) -> None:
        check_num_experts(self.router, self.bank)
        for rule in (self.select, self.eval_select or self.select):
            rule.check_num_experts(self.bank.num_experts)
        object.__setattr__(self, "router", told(self.router, self.select.outputs))
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"], ctx: Context | None = None) -> Float[Array, "b s o"]:
        """Routes `x` and returns the combined outputs, in x's dtype; padding gets zeros from the routed experts.

        Raises:
          ConfigError: parts that do not fit each other, named with both values.
        """
        ctx = ctx or Context()
        b, s, _ = ctx.fit(x)
        tokens, grouped_ctx = group_tokens(x, ctx, self.group_by)
        select = self.select if ctx.train or self.eval_select is None else self.eval_select
        logits = ask(self.router, tokens, grouped_ctx)
        routing = plan_tokens(self, logits, select, self.bank.num_experts, grouped_ctx, self._selection_bias())
        experts = experts_of(self.bank, tokens.shape[-1], ctx)
        y, plan, backend = run_plan(routing.plan, experts, tokens, self.backend, self.group_by)
        routing = routing.replace(plan=plan)
        if self._over_layers():
            start = self.carries(*tokens.shape[:2])[self._carried()]
            routing = routing.replace(earlier=grouped_ctx.recall(self._carried(), start))
            grouped_ctx.remember(self._carried(), routing.so_far())
        sow_routing(self, routing, self.losses, backend=backend)
        if self.balancer is not None and ctx.train:
            if not self.is_initializing() and not self.is_mutable_collection("measured"):
                warnings.warn(_UNMOVED.format(type(self.balancer).__name__, "/".join(self.path) or "the layer"), stacklevel=2)
            control(self, "balancer", self.balancer, self.balancer.measure(routing))
        y = ungroup_tokens(y, b, s, self.group_by).astype(x.dtype)
        if self.shared is not None:
            y = y + sum_shared(self.shared, x, ctx)
        return y

    def carries(self, b: int, s: int) -> Mapping[str, Any]:
        """For losses over all layers: `Routing.earlier`. Layers with as many experts are counted together."""
        if not self._over_layers():
            return {}
        e = self.bank.num_experts
        return {self._carried(): tuple(jnp.zeros((b, s, n)) for n in (e, e, 1))}

    def _over_layers(self) -> bool:
        return any(loss.over_layers for loss in self.losses)

    def _carried(self) -> str:
        return f"routed_{self.bank.num_experts}"

    def _selection_bias(self) -> Float[Array, "e"] | None:
        if self.balancer is None:
            return None
        return self.variable("router_state", STATE, jnp.zeros, (self.bank.num_experts,)).value

    def active_fraction(self) -> float:
        """Share of the routed experts' parameters that a token uses, on average at most; for counting active parameters."""
        return min(1.0, self.select.mean_experts(self.bank.num_experts) / self.bank.num_experts)

    def check_causal(self, where: str) -> None:
        """Raises ConfigError if a token's output may depend on later tokens of its sequence."""
        rules = {"select": self.select, "eval_select": self.eval_select}
        for name, rule in rules.items():
            accepted = name == "select" and self.leaky_training and self.eval_select is not None
            if rule is not None and not rule.causal and self.group_by != "position" and not accepted:
                raise ConfigError(
                    f"{where}.{name} ({type(rule).__name__}) selects over later tokens and leaks the future in a decoder; use "
                    f"{where}.group_by='position' (tokens compete across the batch, not along the sequence), or for capacity "
                    "with k > 1 priority='token'"
                )

    def decodable(self) -> str | None:
        """None if decoding one token at a time gives the plan of a whole forward pass; else the reason why not."""
        rule = self.eval_select or self.select
        if rule.per_token:
            return None
        return (
            f"{type(rule).__name__} plans several tokens together at inference; set eval_select to a per-token rule, or "
            "eval_capacity_factor=None"
        )
