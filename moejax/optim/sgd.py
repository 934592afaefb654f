"""Stochastic gradient descent."""

import dataclasses

import optax

from moejax.optim.base import Optimizer, optimizers


@optimizers.register("sgd")
@dataclasses.dataclass(frozen=True, kw_only=True)
class SGD(Optimizer):
    """Gradient descent with heavy-ball momentum; 0 is plain."""

    momentum: float = 0.0

    def direction(self) -> optax.GradientTransformation:
        return optax.trace(self.momentum) if self.momentum else optax.identity()
