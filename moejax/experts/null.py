"""Null experts: a choice that is spent on nothing (MoE++, Jin et al. 2024; AdaMoE, Zeng et al. 2024)."""

from moejax.core.context import Context
from moejax.core.fields import Count
from moejax.dispatch.experts import Experts, nothing
from moejax.experts.base import Bank
from moejax.experts.registry import banks


@banks.register("null")
class Null(Bank):
    """Experts that give zeros and cost nothing; beside others in a `Mixed` bank, they have those experts' output width.

    Attributes:
      num_experts: e.
    """

    num_experts: Count = 1

    def __call__(self, width: int, ctx: Context | None = None) -> Experts:
        return Experts(nothing, {}, num_experts=self.num_experts, light=True)
