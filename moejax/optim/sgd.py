"""Stochastic gradient descent."""

import dataclasses

import optax

from moejax.core.fields import Rate
from moejax.optim.base import Optimizer, Params, clip, optimizers


@optimizers.register("sgd")
@dataclasses.dataclass(frozen=True, kw_only=True)
class SGD(Optimizer):
    """Gradient descent with heavy-ball momentum; 0 is plain."""

    momentum: Rate = 0.0

    def transform(self, params: Params | None = None) -> optax.GradientTransformation:
        """Clipped gradients, momentum, decoupled decay."""
        momentum = optax.trace(self.momentum) if self.momentum else optax.identity()
        return optax.chain(clip(self.clip_norm), momentum, self.decayed(), self.scheduled())
