"""Expert dropout: in training, some experts are out of a token's reach (sigma-MoE, Csordas et al. 2023)."""

import dataclasses

import jax
from jaxtyping import Array, Bool, Float, Int

from moejax.core.context import Context
from moejax.core.fields import Rate
from moejax.routing.plan import TokenPlan
from moejax.routing.select.base import TokenChoice, selects


@selects.register("expert_dropout", slots={"select": selects})
@dataclasses.dataclass(frozen=True)
class ExpertDropout(TokenChoice):
    """The rule `select`, for which each expert of each token is missing with probability `rate` in training.

    Experts go missing before the selection, so a token still takes k of those that are left (fewer only if fewer are), nobody
    takes up their capacity, and nothing is scaled up for it: with sigmoid weights this is `s * mask` before top-k. Losses and
    statistics see the router's own probabilities. Null experts are never missing. Outside training, and for experts that are
    given from outside, it is `select`.

    Attributes:
      select: a rule of token choice.
      rate: delta, at least 0 and below 1.
    """

    select: TokenChoice
    rate: Rate = 0.05

    @property
    def causal(self) -> bool:
        return self.select.causal

    @property
    def per_token(self) -> bool:
        return self.select.per_token

    @property
    def needs(self) -> tuple[str, ...]:
        return (*self.select.needs, *(("key",) if self.rate else ()))

    @property
    def outputs_per_expert(self) -> int:
        return self.select.outputs_per_expert

    @property
    def null_outputs(self) -> int:
        return self.select.null_outputs

    def plan(self, logits: Float[Array, "g n o"], ctx: Context, bias: Float[Array, "b"] | None) -> TokenPlan:
        if not ctx.train or not self.rate:
            return self.select.plan(logits, ctx, bias)
        here = jax.random.bernoulli(ctx.key, 1 - self.rate, (*logits.shape[:2], self.num_experts(logits.shape[-1])))
        reach = self.reach(logits, ctx)
        reach = here if reach is None else here & reach
        return self.select.plan_among(reach, logits, ctx.replace(key=jax.random.fold_in(ctx.key, 1)), bias)

    def reach(self, logits: Float[Array, "g n o"], ctx: Context) -> Bool[Array, "g n e"] | None:
        """That of `select`: what goes missing is no part of probabilities."""
        return self.select.reach(logits, ctx)

    def choose(
        self, logits: Float[Array, "g n o"], ctx: Context, bias: Float[Array, "b"] | None
    ) -> tuple[Int[Array, "g n k"], Bool[Array, "g n k"]]:
        return self.select.choose(logits, ctx, bias)

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

    def mean_experts(self, num_experts: int) -> float:
        """Experts per token outside training."""
        return self.select.mean_experts(num_experts)
