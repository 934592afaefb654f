"""LARS: momentum with a trust ratio for each layer."""

import dataclasses

import optax

from moejax.core.fields import NonNegative, Rate
from moejax.optim.base import Params, clip, optimizers
from moejax.optim.trust import Trusting


@optimizers.register("lars")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LARS(Trusting):
    """`w <- w - lr * phi(|w|) / |m| * m` with `m <- b1 m + (1 - b1) (g + weight_decay * w)` (You et al. 2020, algorithm 1).

    Attributes:
      b1: of the momentum.
    """

    b1: Rate = 0.9
    weight_decay: NonNegative = 0.01

    def transform(self, params: Params | None = None) -> optax.GradientTransformation:
        """The momentum of clipped gradients with decay, scaled by the trust ratio."""
        momentum = optax.ema(self.b1, debias=False)
        return optax.chain(clip(self.clip_norm), self.decayed(), momentum, self.trusted(params), self.scheduled())
