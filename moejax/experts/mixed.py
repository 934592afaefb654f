"""Experts of several widths and kinds in one layer."""

from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.core.registry import Given, Many
from moejax.dispatch.experts import MixedExperts
from moejax.experts.base import AnyBank, Bank, experts_of
from moejax.experts.registry import banks


# Each part says how many experts it has: the layer's number is that of all parts together.
@banks.register("mixed", slots={"parts": Given(Many(banks), {"num_experts": 1})})
class Mixed(Bank):
    """The experts of several banks, numbered one bank after another; outputs have one width.

        Mixed((FFN(hidden=64, num_experts=6), FFN(hidden=256, num_experts=2), Null(num_experts=4)))

    A config writes a list of banks, or names them, so that each can be overridden by its name:

        bank={"kind": "mixed", "parts": {
            "small": {"kind": "ffn", "hidden": 64, "num_experts": 6},
            "wide": {"kind": "ffn", "hidden": 256, "num_experts": 2},
            "null": {"num_experts": 4},      # the name is the kind where no other is given
        }}

    A choice costs what its own expert costs. Plans that merge parameters (`MergePlan`) are refused.

    Attributes:
      parts: the banks.
    """

    parts: tuple[AnyBank, ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise ConfigError("parts=() holds no bank; name at least one")
        super().__post_init__()

    @property
    def num_experts(self) -> int:
        return sum(part.num_experts for part in self.parts)

    def __call__(self, width: int, ctx: Context | None = None) -> MixedExperts:
        return MixedExperts(tuple(part for bank in self.parts for part in experts_of(bank, width, ctx).parts))
