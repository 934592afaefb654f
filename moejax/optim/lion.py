"""Lion."""

import dataclasses

import optax

from moejax.core.fields import Rate
from moejax.optim.base import Optimizer, Params, clip, optimizers


@optimizers.register("lion")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Lion(Optimizer):
    """The sign of an interpolated momentum (Chen et al. 2023); wants a tenth of AdamW's learning rate."""

    b1: Rate = 0.9
    b2: Rate = 0.99

    def transform(self, params: Params | None = None) -> optax.GradientTransformation:
        """Clipped gradients, signs of a momentum, decoupled decay."""
        return optax.chain(clip(self.clip_norm), optax.scale_by_lion(self.b1, self.b2), self.decayed(), self.scheduled())
