"""A plan's share for some of its experts, and one output from several: how experts of several kinds execute one plan."""

import functools
import operator
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.core.errors import ConfigError
from moejax.dispatch.experts import Experts, nothing
from moejax.routing.plan import ExpertPlan, Plan, SlotPlan, TokenPlan

Run = Callable[[Plan, Experts, Array], tuple[Array, Plan]]


def restrict(plan: Plan, start: int, size: int) -> Plan:
    """The plan of experts `start`, ..., `start + size - 1`, numbered from 0.

    Choices of other experts are no longer used, so that no backend multiplies them; slots of others are cut away.

    Raises:
      ConfigError: a `MergePlan`, whose experts are one.
    """
    if isinstance(plan, TokenPlan):
        inside = (plan.expert >= start) & (plan.expert < start + size)
        return plan.replace(
            expert=jnp.where(inside, plan.expert - start, 0),
            used=plan.used & inside,
            dropped=plan.dropped & inside,
            num_experts=size,
        )
    mine = slice(start, start + size)
    if isinstance(plan, ExpertPlan):
        return plan.replace(token=plan.token[:, mine], weight=plan.weight[:, mine], used=plan.used[:, mine])
    if isinstance(plan, SlotPlan):
        return SlotPlan(plan.dispatch[:, :, mine], plan.combine[:, :, mine])
    raise ConfigError(
        "experts of several kinds have no common parameters to merge, and this is a MergePlan; give the layer a bank of one "
        "kind, or a rule that chooses experts (combine='ensemble' in a smear layer)"
    )


def sum_parts(plan: Plan, parts: Sequence[Experts], x: Float[Array, "g n d"], run: Run) -> tuple[Float[Array, "g n f"], Plan]:
    """The sum of what the parts give for their shares of the plan, and the plan that was executed.

    Args:
      run: executes a plan on one part; gives the output and the executed plan.

    Raises:
      ConfigError: a plan that cannot be cut, or parts whose outputs differ in width.
    """
    starts = [sum(part.num_experts for part in parts[:i]) for i in range(len(parts))]
    shares = [restrict(plan, start, part.num_experts) for start, part in zip(starts, parts, strict=True)]
    ran = [(*run(share, part, x), part) for share, part in zip(shares, parts, strict=True)]
    # Null experts have no width of their own: they add nothing to what the others give.
    outputs = [y for y, _, part in ran if part.function is not nothing] or [jnp.zeros_like(x)]
    widths = sorted({y.shape[-1] for y in outputs})
    if len(widths) > 1:
        raise ConfigError(
            f"experts of one layer give outputs of widths {', '.join(map(str, widths))}; give all banks one width"
        )
    return functools.reduce(operator.add, outputs), _joined(plan, [executed for _, executed, _ in ran])


def _joined(plan: Plan, executed: list[Plan]) -> Plan:
    """The whole plan, less what the bound of an exchange took from a part."""
    if not isinstance(plan, TokenPlan):
        return plan
    used = functools.reduce(operator.or_, [part.used for part in executed])
    return plan.replace(used=used, dropped=plan.dropped | (plan.used & ~used))
