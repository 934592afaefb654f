"""Select rules: from logits, and what is known of their tokens, to a plan. What all rules share is here, once.

A rule is a frozen dataclass: configuration without state. Most rules let tokens choose; such a rule writes `choose`, and, if a
choice's weight is not simply its probability, `weights`:

    @selects.register("top_half")
    @dataclasses.dataclass(frozen=True)
    class TopHalf(TokenChoice):
        '''Each token takes the better half of all experts.'''
        causal, per_token = True, True

        def choose(self, logits, ctx, bias):
            expert = best(logits if bias is None else logits + bias, logits.shape[-1] // 2)
            return expert, jnp.ones(expert.shape, bool)

Padding, keys, null experts, experts that are given from outside, capacity and the errors for what does not fit are not its
business.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.core.fields import Positive, check
from moejax.core.registry import Registry
from moejax.routing.capacity import Priority, drop_over_capacity
from moejax.routing.plan import Plan, TokenPlan, dropless
from moejax.routing.scores import take

selects = Registry("select", "moejax.routing.select")

NO_CONTEXT = Context()

# Far below every logit: a weight of 0, except as a raw logit, which the plan's `used` keeps out.
_OUT_OF_REACH = -1e9

# What a rule may need to know -> who gives it. Key and step are needed in training only.
_GIVEN_BY = {
    "key": "it draws at random in training; a layer gives it a key of its rng stream 'router', a call by hand Context(key=...)",
    "step": "it follows the training step; a task gives it, a call by hand Context(step=...)",
    "layer": "it differs from layer to layer; a model's stack gives it, a call by hand Context(layer=...)",
    "token_ids": "it looks at the tokens themselves; models of tokens give them, a call by hand Context(token_ids=...)",
    "domain": "it looks at where tokens come from; a batch with domains gives them, a call by hand Context(domain=...)",
}


@dataclasses.dataclass(frozen=True)
class Select:
    """`select(logits, ctx) -> plan`.

    Attributes of the class, refused or plain unless a rule says otherwise:
      causal: whether a token's plan never depends on later tokens of its group.
      per_token: whether a token's plan depends on that token alone, so that decoding one token at a time gives the same plan.
      needs: fields of the context that the rule cannot do without; 'key' and 'step' in training only.
      outputs_per_expert: logits of each expert.
      null_outputs: logits after those of the experts: of choices that run nothing.
    """

    causal: ClassVar[bool] = False
    per_token: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ()
    outputs_per_expert: ClassVar[int] = 1
    null_outputs: ClassVar[int] = 0

    def __post_init__(self) -> None:
        check(type(self), vars(self))  # of one's own rule too, which no registry knows

    def __call__(
        self, logits: Float[Array, "g n o"], ctx: Context = NO_CONTEXT, *, bias: Float[Array, "b"] | None = None
    ) -> Plan:
        """The plan for `logits`.

        Args:
          ctx: of the grouped tokens. Its padding gets no used entry, and its logits touch nothing.
          bias: added for ranking only, never to weights.

        Raises:
          ConfigError: there are too few experts, or the context lacks what the rule needs.
        """
        self.check(logits.shape[-1], ctx)
        return self.plan(ctx.clean(logits), ctx, bias)

    def plan(self, logits: Float[Array, "g n o"], ctx: Context, bias: Float[Array, "b"] | None) -> Plan:
        """What the rule is: its plan for logits that are zeros in padding."""
        raise NotImplementedError(f"{type(self).__name__}.plan")

    def probabilities(self, logits: Float[Array, "g n o"]) -> Float[Array, "g n e"]:
        """Each token's distribution over experts, rows summing to 1: what balance losses and entropies are about."""
        return jax.nn.softmax(logits, axis=-1)

    def within_reach(self, logits: Float[Array, "g n o"], ctx: Context) -> Float[Array, "g n o"]:
        """The logits on which a token's choice and its probabilities rest: all of them."""
        return logits

    def mean_experts(self, num_experts: int) -> float:
        """How many experts process a token on average, before drops: for counting active parameters. Without a `k`, all of them."""
        return float(min(getattr(self, "k", num_experts), num_experts))

    @property
    def outputs(self) -> tuple[int, int]:
        """Logits of each expert, and those of null experts: what a router is told."""
        return self.outputs_per_expert, self.null_outputs

    def num_outputs(self, num_experts: int) -> int:
        """How many logits a token the rule reads: its share for each expert, then those of null experts."""
        return self.outputs_per_expert * num_experts + self.null_outputs

    def num_experts(self, num_outputs: int) -> int:
        """The inverse of `num_outputs`."""
        num_experts, rest = divmod(num_outputs - self.null_outputs, self.outputs_per_expert)
        if rest or num_experts < 1:
            raise ConfigError(
                f"{type(self).__name__} cannot read {num_outputs} logits a token: it needs {self.outputs_per_expert} for each "
                f"expert and {self.null_outputs} for null experts"
            )
        return num_experts

    def check(self, num_outputs: int, ctx: Context) -> None:
        """Raises ConfigError if this number of logits does not fit, or the context lacks what the rule needs."""
        self.check_num_experts(self.num_experts(num_outputs))
        for name in self.needs:
            if getattr(ctx, name) is None and (ctx.train or name not in ("key", "step")):
                raise ConfigError(
                    f"the select rule {type(self).__name__} lacks Context.{name}: {_GIVEN_BY.get(name, 'it cannot do without')}"
                )

    def check_num_experts(self, num_experts: int) -> None:
        """Raises ConfigError if tokens are to take more experts than there are."""
        null = f" and num_null={self.null_outputs} together" if self.null_outputs else ""
        for name in ("k", "max_experts"):
            value = getattr(self, name, None)
            if value is not None and value > num_experts + self.null_outputs:
                raise ConfigError(f"{name}={value} exceeds num_experts={num_experts}{null}; lower {name} or add experts")


@dataclasses.dataclass(frozen=True)
class TokenChoice(Select):
    """A rule under which tokens choose. It writes `choose`, and what else of the following differs from what is here.

    In all of them padding's logits are zeros and `expert` may be a null expert (an index from the number of experts on).
    """

    def choose(
        self, logits: Float[Array, "g n o"], ctx: Context, bias: Float[Array, "b"] | None
    ) -> tuple[Int[Array, "g n k"], Bool[Array, "g n k"]]:
        """Each token's experts, the first choice first, and which of these choices it wants."""
        raise NotImplementedError(f"{type(self).__name__}.choose")

    def weights(
        self, logits: Float[Array, "g n o"], expert: Int[Array, "g n k"], wanted: Bool[Array, "g n k"], ctx: Context
    ) -> Float[Array, "g n k"]:
        """The weight of each choice; what it is where a choice is not wanted does not matter."""
        return take(self.probabilities(logits), expert)

    def reach(self, logits: Float[Array, "g n o"], ctx: Context) -> Bool[Array, "g n e"] | None:
        """Which experts a token may choose at all; None for all. Logits of others are far below the rest in `choose` and `weights`."""
        return None

    def accepts(self, logits: Float[Array, "g n o"], expert: Int[Array, "g n k"], ctx: Context) -> Bool[Array, "g n k"]:
        """Which of the experts that are given to a token from outside it takes: all of them."""
        return jnp.ones(expert.shape, bool)

    def within_capacity(self, plan: TokenPlan, logits: Float[Array, "g n o"], ctx: Context) -> TokenPlan:
        """The plan without the choices for which there is no room: dropless."""
        return plan

    def widest(self, num_experts: int) -> "TokenChoice":
        """The rule with as many choices as it can make. Only a rule that takes the `k` best knows."""
        raise ConfigError(
            f"another k can be forced on rules that take the k best of their experts, not on {type(self).__name__}"
        )

    def given(self, logits: Float[Array, "g n o"], expert: Int[Array, "g n k"], ctx: Context = NO_CONTEXT) -> TokenPlan:
        """The plan in which tokens take the given experts, with the weights and the capacity that the rule gives them."""
        logits = ctx.clean(logits)
        return self.assemble(logits, expert, self.accepts(logits, expert, ctx), ctx)

    def with_k(
        self,
        logits: Float[Array, "g n o"],
        k: Int[Array, ""],
        ctx: Context = NO_CONTEXT,
        *,
        bias: Float[Array, "b"] | None = None,
    ) -> TokenPlan:
        """The plan with another `k`, which may be data: as many of a token's experts as the rule can rank."""
        self.check(logits.shape[-1], ctx)
        logits = ctx.clean(logits)
        return self.plan_among(self.reach(logits, ctx), logits, ctx, bias, k)

    def plan(self, logits: Float[Array, "g n o"], ctx: Context, bias: Float[Array, "b"] | None) -> TokenPlan:
        return self.plan_among(self.reach(logits, ctx), logits, ctx, bias)

    def plan_among(
        self,
        reach: Bool[Array, "g n e"] | None,
        logits: Float[Array, "g n o"],
        ctx: Context,
        bias: Float[Array, "b"] | None,
        k: Int[Array, ""] | None = None,
    ) -> TokenPlan:
        """The plan of tokens that choose among the experts in their reach; with a `k`, so many of them."""
        logits = self._hide(logits, reach)
        rule = self if k is None else self.widest(self.num_experts(logits.shape[-1]))
        expert, wanted = rule.choose(logits, ctx, bias)
        if k is not None:
            wanted = wanted & (jnp.arange(expert.shape[-1]) < k)
        if reach is not None:
            wanted = wanted & take(self._with_null(reach), expert)
        return self.assemble(logits, expert, wanted, ctx)

    def assemble(
        self, logits: Float[Array, "g n o"], expert: Int[Array, "g n k"], wanted: Bool[Array, "g n k"], ctx: Context
    ) -> TokenPlan:
        """The plan of these choices: their weights, nothing for padding and null experts, and who finds room."""
        num_experts = self.num_experts(logits.shape[-1])
        weight = self.weights(logits, expert, wanted, ctx)
        if self.null_outputs:
            true = expert < num_experts
            weight, wanted = jnp.where(true, weight, 0), wanted & true
            expert = jnp.minimum(expert, num_experts - 1)
        if ctx.valid is not None:
            wanted = wanted & ctx.valid[..., None]
        return self.within_capacity(dropless(expert, weight, wanted, num_experts), logits, ctx)

    def within_reach(self, logits: Float[Array, "g n o"], ctx: Context) -> Float[Array, "g n o"]:
        return self._hide(logits, self.reach(logits, ctx))

    def _hide(self, logits: Float[Array, "g n o"], reach: Bool[Array, "g n e"] | None) -> Float[Array, "g n o"]:
        if reach is None:
            return logits
        return jnp.where(self._with_null(jnp.repeat(reach, self.outputs_per_expert, axis=-1)), logits, _OUT_OF_REACH)

    def _with_null(self, reach: Bool[Array, "g n e"]) -> Bool[Array, "g n o"]:
        """Null experts are in everybody's reach."""
        return jnp.pad(reach, ((0, 0), (0, 0), (0, self.null_outputs)), constant_values=True)


@dataclasses.dataclass(frozen=True)
class CapacityLimited(TokenChoice):
    """A token-choice rule whose experts may have room for so many tokens of a group and no more.

    Attributes:
      capacity_factor: see `capacity.compute_capacity`; None is dropless.
      eval_capacity_factor: the factor outside training; 'same' by default, since another one changes the function.
      priority: who is served first when experts fill up; see `capacity.drop_over_capacity`.
    """

    capacity_factor: Positive | None = dataclasses.field(default=None, kw_only=True)
    eval_capacity_factor: Positive | None | Literal["same"] = dataclasses.field(default="same", kw_only=True)
    priority: Priority = dataclasses.field(default="token", kw_only=True)

    def token_score(self, logits: Float[Array, "g n o"]) -> Float[Array, "g n"]:
        """Who is served first under priority='score': the token with the largest probability."""
        return self.probabilities(logits).max(-1)

    def factor(self, train: bool) -> float | None:
        """The capacity factor in training or outside; None is dropless."""
        return self.capacity_factor if train or self.eval_capacity_factor == "same" else self.eval_capacity_factor

    @property
    def causal(self) -> bool:
        if all(self.factor(train) is None for train in (True, False)):
            return True
        return self.priority == "token" or (self.priority == "choice" and getattr(self, "k", None) == 1)

    @property
    def per_token(self) -> bool:
        return self.factor(train=False) is None

    def within_capacity(self, plan: TokenPlan, logits: Float[Array, "g n o"], ctx: Context) -> TokenPlan:
        factor = self.factor(ctx.train)
        if factor is None:
            return plan
        return drop_over_capacity(plan, ctx.valid, factor, self.priority, score=self.token_score(logits))
