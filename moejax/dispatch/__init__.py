"""Dispatch: executing a plan on a bank. `dispatch(plan, bank, x, backend='auto')`."""

from jaxtyping import Array, Float

from moejax.dispatch.backends import ACCEPTS, BACKENDS, Bank, gather_tokens, scatter_tokens
from moejax.dispatch.layout import Batched, Grouped, Layout, Merged, PerToken
from moejax.errors import ConfigError, nearest
from moejax.routing.plan import ExpertChoice, Merge, Plan, SoftSlots
from pallas_kernels.implementations import current_chip

# What the bench measured on a CPU (experiments/bench/results); a test holds `choose` to it.
NARROW = 128  # width of tokens up to which a turn of a loop costs more than the tile it computes
FEW_ROWS = 8  # rows per expert up to which slots waste less than loops do


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
    name = choose(plan, x.shape[-1]) if backend == "auto" else backend
    if name not in BACKENDS:
        raise ConfigError(f"backend='{name}' is unknown{nearest(name, [*BACKENDS, 'auto'])}")
    if not isinstance(plan, ACCEPTS[name]):
        able = [b for b, kinds in ACCEPTS.items() if isinstance(plan, kinds)]
        raise ConfigError(f"backend='{name}' cannot execute a {type(plan).__name__} plan; use one of: {', '.join(able)}, auto")
    return BACKENDS[name](plan, bank, x)


def choose(plan: Plan, width: int, platform: str | None = None) -> str:
    """The backend that 'auto' stands for: the fastest one measured for such a plan.

    Args:
      plan: its type, sizes and capacity matter, not its data.
      width: d, of the tokens.
      platform: 'cpu', 'tpu' or 'gpu'; that of the kernels' target by default.
    """
    platform = platform or current_chip().platform
    if isinstance(plan, Merge):
        return "merged"
    if isinstance(plan, SoftSlots):
        return "einsum"
    if isinstance(plan, ExpertChoice):
        return "capacity"
    g, n, k = plan.expert.shape
    rows = g * n * k
    if platform == "cpu":
        few = rows <= FEW_ROWS * plan.num_experts
        if plan.capacity is not None:
            return "capacity" if few or width <= NARROW else "grouped"
        return "gather" if rows <= plan.num_experts and width <= NARROW else "grouped"
    # Not measured: a row that gathers its expert has nobody to share the reading with.
    return "gather" if 4 * rows <= plan.num_experts else "grouped"


def backend_index(name: str) -> int:
    """Position of a backend in `BACKENDS`: how statistics say which one ran."""
    return list(BACKENDS).index(name)


__all__ = [
    "ACCEPTS", "BACKENDS", "Bank", "Batched", "Grouped", "Layout", "Merged", "PerToken",
    "backend_index", "choose", "dispatch", "gather_tokens", "scatter_tokens",
]  # fmt: skip
