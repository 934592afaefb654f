"""Dispatch: executing a plan on a bank. `dispatch(plan, bank, x, backend='auto')`."""

import jax
from jaxtyping import Array, Float

from moejax.dispatch.backends import ACCEPTS, BACKENDS, Bank, gather_tokens, scatter_tokens
from moejax.dispatch.layout import Batched, Grouped, Layout, Merged, PerToken
from moejax.errors import ConfigError, nearest
from moejax.routing.plan import ExpertChoice, Merge, Plan, SoftSlots

# A row that gathers its own expert reads d * f numbers; a sorted row shares that read with its group. Below this many rows per
# expert on average there is nobody to share with (see experiments/bench).
GATHER_ROWS_PER_EXPERT = 0.25


def dispatch(plan: Plan, bank: Bank, x: Float[Array, "g n d"], backend: str = "auto") -> Float[Array, "g n f"]:
    """`y[g, n] = sum over the plan's used entries of weight * expert(x[g, n])`.

    Args:
      plan: who goes where, from a select rule.
      bank: the experts: a function (or Flax module) of rows and a layout.
      x: tokens; the plan's tokens, in the plan's groups.
      backend: a name of `BACKENDS`, which runs or raises, or 'auto'.

    Raises:
      ConfigError: unknown backend, or one that cannot execute this kind of plan.
    """
    name = choose(plan) if backend == "auto" else backend
    if name not in BACKENDS:
        raise ConfigError(f"backend='{name}' is unknown{nearest(name, [*BACKENDS, 'auto'])}")
    if not isinstance(plan, ACCEPTS[name]):
        able = [b for b, kinds in ACCEPTS.items() if isinstance(plan, kinds)]
        raise ConfigError(f"backend='{name}' cannot execute a {type(plan).__name__} plan; use one of: {', '.join(able)}, auto")
    return BACKENDS[name](plan, bank, x)


def choose(plan: Plan, platform: str | None = None) -> str:
    """The backend that 'auto' stands for, from the plan's type and sizes and the platform (the default one's if None)."""
    platform = platform or jax.default_backend()
    if isinstance(plan, Merge):
        return "merged"
    if isinstance(plan, SoftSlots):
        return "einsum"
    if isinstance(plan, ExpertChoice):
        return "capacity"
    g, n, k = plan.expert.shape
    if g * n * k <= GATHER_ROWS_PER_EXPERT * plan.num_experts:
        return "gather"
    return "grouped"


def backend_index(name: str) -> int:
    """Position of a backend in `BACKENDS`: how statistics say which one ran."""
    return list(BACKENDS).index(name)


__all__ = [
    "ACCEPTS", "BACKENDS", "Bank", "Batched", "Grouped", "Layout", "Merged", "PerToken",
    "backend_index", "choose", "dispatch", "gather_tokens", "scatter_tokens",
]  # fmt: skip
