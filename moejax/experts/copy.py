"""Copy experts: a choice that gives the token itself (MoE++, Jin et al. 2024)."""

from jaxtyping import Array, Float

from moejax.core.context import Context
from moejax.core.fields import Count
from moejax.dispatch.experts import Experts
from moejax.dispatch.layout import Layout
from moejax.experts.base import Bank
from moejax.experts.registry import banks


@banks.register("copy")
class Copy(Bank):
    """Experts that give their input: `y = x`. Without parameters; tokens stay where they are.

    Attributes:
      num_experts: e.
    """

    num_experts: Count = 1

    def __call__(self, width: int, ctx: Context | None = None) -> Experts:
        return Experts(_copy, {}, num_experts=self.num_experts, light=True)


def _copy(params: dict[str, Array], x: Float[Array, "*m d"], layout: Layout) -> Float[Array, "*m d"]:
    return x
