"""`dispatch(plan, bank, x, backend='auto')`: executing a plan on a bank, and what 'auto' means."""

from collections.abc import Callable

from jaxtyping import Array, Float

from moejax.core.errors import ConfigError, nearest
from moejax.dispatch.backends import (
    Bank,
    capacity,
    einsum,
    gather,
    grouped,
    merged,
    reference,
)
from moejax.dispatch.expert_parallel.run import expert_parallel
from moejax.parallel.mesh import batch_ways
from moejax.parallel.scope import current
from moejax.routing.plan import ExpertPlan, MergePlan, Plan, SlotPlan, TokenPlan
from pallas_kernels.implementations import current_chip

# What the bench measured on a CPU (experiments/bench/results); a test holds `choose` to it.
NARROW = 128  # width of tokens up to which a turn of a loop costs more than the tile it computes
FEWEST_ROWS = 2  # rows for which no loop is worth its start
FEW_ROWS = 8  # rows per expert up to which slots waste less than loops do

BACKENDS: dict[str, Callable[[Plan, Bank, Array], Array]] = {
    "reference": reference,
    "einsum": einsum,
    "capacity": capacity,
    "grouped": grouped,
    "gather": gather,
    "merged": merged,
    "expert_parallel": expert_parallel,
}
ACCEPTS: dict[str, tuple[type, ...]] = {
    "reference": (TokenPlan, ExpertPlan, SlotPlan, MergePlan),
    "einsum": (TokenPlan, ExpertPlan, SlotPlan),
    "capacity": (TokenPlan, ExpertPlan),
    "grouped": (TokenPlan, ExpertPlan),
    "gather": (TokenPlan, ExpertPlan),
    "merged": (MergePlan,),
    "expert_parallel": (TokenPlan, ExpertPlan, SlotPlan, MergePlan),
}


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
        able = [b for b, kinds in ACCEPTS.items() if isinstance(plan, kinds) and (b != "expert_parallel" or current())]
        raise ConfigError(f"backend='{name}' cannot execute a {type(plan).__name__} plan; use one of: {', '.join(able)}, auto")
    return BACKENDS[name](plan, bank, x)


def choose(plan: Plan, width: int, platform: str | None = None) -> str:
    """The backend that 'auto' stands for: the fastest one measured for such a plan.

    Args:
      plan: its type, sizes and capacity matter, not its data. On a mesh, sorting rows under automatic sharding would gather
        them all on every device: plans go to 'expert_parallel' there.
      width: d, of the tokens.
      platform: 'cpu', 'tpu' or 'gpu'; that of the kernels' target by default.
    """
    platform, parallel = platform or current_chip().platform, current()
    if parallel is not None and parallel.mesh.size > 1 and _splits(plan, batch_ways(parallel.mesh)):
        return "expert_parallel"
    if isinstance(plan, MergePlan):
        return "merged"
    if isinstance(plan, SlotPlan):
        return "einsum"
    if isinstance(plan, ExpertPlan):
        return "capacity"
    g, n, k = plan.expert.shape
    rows = g * n * k
    if platform == "cpu":
        few = rows <= FEW_ROWS * plan.num_experts
        if plan.capacity is not None:
            return "capacity" if few or width <= NARROW else "grouped"
        return "gather" if rows <= FEWEST_ROWS or (rows <= plan.num_experts and width <= NARROW) else "grouped"
    # Not measured: a row that gathers its expert has nobody to share the reading with.
    return "gather" if 4 * rows <= plan.num_experts else "grouped"


def _splits(plan: Plan, ways: int) -> bool:
    """Whether the plan can be cut into the mesh's parts of a batch. Groups of soft slots and of one expert cannot be cut themselves."""
    if isinstance(plan, MergePlan):
        return plan.weight.shape[0] % ways == 0
    return not isinstance(plan, SlotPlan) or plan.dispatch.shape[0] % ways == 0


def backend_index(name: str) -> int:
    """Position of a backend in `BACKENDS`: how statistics say which one ran."""
    return list(BACKENDS).index(name)
