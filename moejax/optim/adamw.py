"""AdamW."""

import dataclasses

import optax

from moejax.core.fields import NonNegative, Rate
from moejax.optim.base import Optimizer, Params, clip, optimizers


@optimizers.register("adamw")
@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""

    b1: Rate = 0.9
    b2: Rate = 0.95
    eps: NonNegative = 1e-8

    def transform(self, params: Params | None = None) -> optax.GradientTransformation:
        """Clipped gradients, Adam's direction, decoupled decay."""
        return optax.chain(
            clip(self.clip_norm), optax.scale_by_adam(self.b1, self.b2, self.eps), self.decayed(), self.scheduled()
        )
