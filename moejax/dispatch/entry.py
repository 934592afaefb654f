"""`dispatch(plan, experts, x, backend='auto')`: executing a plan on experts, and what 'auto' means."""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.core.errors import ConfigError, nearest
from moejax.dispatch.backends import capacity, einsum, gather, grouped, merged, reference
from moejax.dispatch.expert_parallel.run import expert_parallel, limit
from moejax.dispatch.experts import Experts, MixedExperts, nothing
from moejax.dispatch.forward_mode import backward_only
from moejax.dispatch.parts import sum_parts
from moejax.parallel.mesh import batch_ways
from moejax.parallel.scope import current
from moejax.routing.plan import ExpertPlan, MergePlan, Plan, SlotPlan, TokenPlan
from pallas_kernels.implementations import current_chip

# What the bench measured on a CPU (experiments/bench/results); a test holds `choose` to it.
NARROW = 128  # width of tokens up to which a turn of a loop costs more than the tile it computes
FEWEST_ROWS = 2  # rows for which no loop is worth its start
FEW_ROWS = 8  # rows per expert up to which slots waste less than loops do

BACKENDS: dict[str, Callable[[Plan, Experts, Array], Array]] = {
    "reference": reference,
    "einsum": einsum,
    "capacity": capacity,
    "grouped": grouped,
    "gather": gather,
    "merged": merged,
    "expert_parallel": expert_parallel,
}
# Their derivatives are written by hand.
BACKWARD = ("grouped", "expert_parallel")
BACKWARD_ONLY = (
    "has derivatives that go backward, and once: for jax.jvp, jax.linearize and Hessian-vector products take 'capacity', 'gather', "
    "'einsum' or 'reference'"
)
Backend: TypeAlias = Literal["auto", *BACKENDS]
ACCEPTS: dict[str, tuple[type, ...]] = {
    "reference": (TokenPlan, ExpertPlan, SlotPlan, MergePlan),
    "einsum": (TokenPlan, ExpertPlan, SlotPlan),
    "capacity": (TokenPlan, ExpertPlan),
    "grouped": (TokenPlan, ExpertPlan),
    "gather": (TokenPlan, ExpertPlan),
    "merged": (MergePlan,),
    "expert_parallel": (TokenPlan, ExpertPlan, SlotPlan, MergePlan),
}


def dispatch(plan: Plan, experts: Any, x: Float[Array, "g n d"], backend: str = "auto") -> Float[Array, "g n f"]:
    """`y[g, n] = sum over the plan's used entries of weight * expert(x[g, n])`.

        experts = bank(x.shape[-1], ctx)
        y = dispatch(plan, experts, x)

    Tokens of no used entry give zeros, and whatever they hold, NaN included, touches neither values nor gradients.

    Args:
      plan: who goes where, from a select rule.
      experts: `Experts`, or `MixedExperts` of several kinds.
      x: tokens; the plan's tokens, in the plan's groups.
      backend: a name of `BACKENDS`, which runs or raises, or 'auto'.

    'grouped', which 'auto' often is, has derivatives of its own that go backward and once: for `jax.jvp` and Hessian-vector
    products name 'capacity', 'gather', 'einsum' or 'reference'.

    Raises:
      ConfigError: unknown backend, one that cannot execute this kind of plan, or experts that are not the plan's.
    """
    return execute(plan, experts, x, backend)[0]


def execute(
    plan: Plan, experts: Any, x: Float[Array, "g n d"], backend: str = "auto"
) -> tuple[Float[Array, "g n f"], Plan, str]:
    """As `dispatch`, with the plan that was executed and the backend that ran.

    The executed plan has less in it than the given one where an exchange between devices has a bound (`limit`).
    """
    _check(experts, plan.num_experts)
    x = _needed(plan, x)
    light = all(part.light for part in experts.parts) and isinstance(plan, TokenPlan)
    name = backend if backend != "auto" else "gather" if light else choose(plan, x.shape[-1])
    if name not in BACKENDS:
        raise ConfigError(f"backend='{name}' is unknown{nearest(name, [*BACKENDS, 'auto'])}")
    if name in ("grouped", "expert_parallel") and _symbolic(plan):
        raise ConfigError(
            f"backend='{name}' needs sizes that are numbers, and these are symbolic (jax.export); take 'capacity', 'gather' or "
            "'reference', or leave it to 'auto'"
        )
    if not isinstance(plan, ACCEPTS[name]):
        able = [b for b, kinds in ACCEPTS.items() if isinstance(plan, kinds) and (b != "expert_parallel" or current())]
        raise ConfigError(f"backend='{name}' cannot execute a {type(plan).__name__} plan; use one of: {', '.join(able)}, auto")

    def run(plan: Plan, part: Experts, x: Array) -> tuple[Array, Plan]:
        part = part.folded() if isinstance(plan, MergePlan) else part
        if part.function is nothing:
            return jnp.zeros_like(x), plan
        if backend == "auto" and part.light and isinstance(plan, TokenPlan):
            return gather(plan, part, x), plan
        if name in BACKWARD:
            plan, x, params = backward_only((plan, x, part.params), f"backend='{name}' {BACKWARD_ONLY}")
            part = part.replace(params=params)
        plan = limit(plan, current()) if name == "expert_parallel" else plan
        return BACKENDS[name](plan, part, x), plan

    y, plan = run(plan, experts, x) if isinstance(experts, Experts) else sum_parts(plan, experts.parts, x, run)
    return y, plan, name


def choose(plan: Plan, width: int, platform: str | None = None) -> str:
    """The backend that 'auto' stands for: the fastest one measured for such a plan.

    Args:
      plan: its type, sizes (which may be symbolic) and capacity matter, not its data. On a mesh, sorting rows under automatic sharding would gather
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
    if _symbolic(plan):
        # No loops over rows that nobody has counted: slots where the plan has a bound for them, else every expert on every token.
        return "reference" if plan.capacity is None else "capacity"
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


def _symbolic(plan: Plan) -> bool:
    """Whether the plan's sizes are unknown, as `jax.export` has them for a batch of any size."""
    return not all(isinstance(size, int) for leaf in jax.tree.leaves(plan) for size in leaf.shape)


def _needed(plan: Plan, x: Float[Array, "g n d"]) -> Float[Array, "g n d"]:
    """The tokens, with zeros for those that no expert is to see: what lies there, NaN or infinity, then touches nothing."""
    if isinstance(plan, TokenPlan):
        return jnp.where(plan.used.any(-1, keepdims=True), x, 0)
    if isinstance(plan, ExpertPlan):
        return jnp.where((plan.assigned() > 0).any(-1, keepdims=True), x, 0)
    if isinstance(plan, SlotPlan):
        # Finite ones stay: a weight of zero may have a gradient.
        none = ~(plan.dispatch != 0).any((-2, -1))[..., None]
        return jnp.where(none & ~jnp.isfinite(x), 0, x)
    return x


def backend_index(name: str) -> int:
    """Position of a backend in `BACKENDS`: how statistics say which one ran."""
    return list(BACKENDS).index(name)


def backend_name(index: Any) -> str:
    """The backend that a layer's statistic 'backend' stands for: the inverse of `backend_index`."""
    return list(BACKENDS)[int(index)]


def _check(experts: Any, num_experts: int) -> None:
    """Refuses what are no experts, or not as many as the plan has: an index past the last would be clamped in silence."""
    if not isinstance(experts, (Experts, MixedExperts)):
        raise ConfigError(
            f"experts must be moejax.Experts, and this is a {type(experts).__name__}; call the bank first: "
            "experts = bank(x.shape[-1], ctx), dispatch(plan, experts, x)"
        )
    if experts.num_experts != num_experts:
        raise ConfigError(
            f"the plan has num_experts={num_experts}, but there are {experts.num_experts} experts; make them as many"
        )
