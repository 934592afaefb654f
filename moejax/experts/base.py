"""What a bank is: a Flax module that owns the parameters of e experts and, called, gives the experts as a value."""

from typing import Any, Protocol, runtime_checkable

from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.core.layer import RowWise
from moejax.dispatch.experts import AnyExperts, Experts, MixedExperts


@runtime_checkable
class AnyBank(Protocol):
    """What a layer needs of a bank: a `num_experts`, and a call with the width of the tokens that gives the experts."""

    num_experts: int

    def __call__(self, width: int, ctx: Context | None = None) -> AnyExperts: ...


class Bank(RowWise):
    """`bank(width, ctx) -> Experts` for tokens of that width; `bank.init(key, width)` makes its parameters.

        @banks.register("linear")
        class Linears(Bank):
            num_experts: int = 1

            @nn.compact
            def __call__(self, width, ctx=None):
                params, axes = declare(self, {"w": (INIT, (self.num_experts, width, width), ("expert", "embed", None))})
                return Experts(lambda p, x, layout: layout.dot(x, p["w"]), params, axes)

    Any object with this `__call__` and a `num_experts` will do; this class says besides that a token's output is its own affair.

    Attributes:
      num_experts: e, a field or a property of each kind.
    """

    def __call__(self, width: int, ctx: Context | None = None) -> AnyExperts:
        """The experts. Statistics and whatever else a pure function of rows cannot keep belong here, not into the function."""
        raise NotImplementedError(f"{type(self).__name__} has no __call__(width, ctx) that returns moejax.Experts")


def experts_of(bank: Any, width: int, ctx: Context | None = None) -> AnyExperts:
    """`bank(width, ctx)`. Raises ConfigError for what is no bank."""
    name = type(bank).__name__
    if not callable(bank) or not hasattr(bank, "num_experts"):
        raise ConfigError(
            f"bank={name} is no bank: it needs num_experts and a __call__(width, ctx) that returns moejax.Experts; derive it from "
            "moejax.Bank"
        )
    experts = bank(width, ctx)
    if not isinstance(experts, (Experts, MixedExperts)):
        raise ConfigError(
            f"the bank {name} returned a {type(experts).__name__}; a bank is called as bank(width, ctx) and returns "
            "moejax.Experts(function, params, axes)"
        )
    if experts.num_experts != bank.num_experts:
        raise ConfigError(
            f"the bank {name} says num_experts={bank.num_experts} and returned {experts.num_experts} experts; make them as many"
        )
    return experts
