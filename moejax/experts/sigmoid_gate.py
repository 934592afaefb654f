"""Experts whose output each token scales by a gate of its own: the shared expert of Qwen2-MoE."""

import flax.linen as nn
import jax
from jaxtyping import Array

from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.core.initializers.registry import initializers
from moejax.core.initializers.usual import FanIn
from moejax.core.params import Initializer, per_expert
from moejax.dispatch.experts import AnyExperts, Experts, Matrices
from moejax.dispatch.layout import Layout
from moejax.experts.base import AnyBank, Bank
from moejax.experts.registry import banks, declare


@banks.register("sigmoid_gate", slots={"bank": banks, "init_gate": initializers})
class SigmoidGate(Bank):
    """`sigmoid(x g) f(x)` for each expert f of `bank` (Qwen2-MoE, Qwen Team 2024: `shared_expert_gate`).

    As `shared` of a `MoE`, so that a token may do without the shared expert.

    Attributes:
      bank: the experts.
      init_gate: how g `[e, d, 1]` starts.
    """

    bank: AnyBank
    init_gate: Initializer = FanIn()

    @property
    def num_experts(self) -> int:
        return self.bank.num_experts

    @nn.compact
    def __call__(self, width: int, ctx: Context | None = None) -> AnyExperts:
        found = self.bank(width, ctx)
        if not isinstance(found, Experts):
            raise ConfigError(f"sigmoid_gate.bank={type(self.bank).__name__} holds experts of several kinds; gate each kind")
        found = found.folded()
        gates, axes = declare(
            self, {"gate": (per_expert(self.init_gate), (self.num_experts, width, 1), ("expert", "embed", None))}
        )
        inner = found.function

        def expert(p: Matrices, x: Array, layout: Layout, *key: Array) -> Array:
            return inner(p["bank"], x, layout, *key) * jax.nn.sigmoid(layout.dot(x, p["gate"]))

        axes = None if found.axes is None else {"bank": found.axes, **axes}
        return Experts(expert, {"bank": found.params, **gates}, axes, key=found.key, num_experts=self.num_experts)
