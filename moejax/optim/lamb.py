"""LAMB: Adam's direction with a trust ratio for each layer."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from moejax.core.fields import NonNegative, Rate
from moejax.optim.base import Params, clip, optimizers
from moejax.optim.trust import Trusting


@optimizers.register("lamb")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LAMB(Trusting):
    """`w <- w - lr * phi(|w|) / |u| * u` with `u = m / (sqrt(v) + eps) + weight_decay * w` (You et al. 2020, algorithm 2).

    m and v are Adam's moments, corrected for their age. Learning rates are those of no other optimizer: an update is `lr` times as
    long as the layer. The large-batch recipe scales them with the square root of the batch and keeps the number of warm-up steps.

    Attributes:
      b1, b2, eps: of the moments.
      corrected: divides the moments by what their age lacks, as Adam does; with a warm-up it matters little (section 3.1).
    """

    b1: Rate = 0.9
    b2: Rate = 0.999
    eps: NonNegative = 1e-6
    weight_decay: NonNegative = 0.01
    corrected: bool = True

    def transform(self, params: Params | None = None) -> optax.GradientTransformation:
        """Clipped gradients, Adam's direction and the decay, scaled together by the trust ratio."""
        adam = optax.scale_by_adam if self.corrected else _scale_by_raw_moments
        return optax.chain(
            clip(self.clip_norm), adam(self.b1, self.b2, self.eps), self.decayed(), self.trusted(params), self.scheduled()
        )


def _scale_by_raw_moments(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """`m / (sqrt(v) + eps)` of moments that are too small while they are young."""

    def init(params: Params) -> tuple[Params, Params]:
        return jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params)

    def update(grads: Params, state: tuple[Params, Params], params: Params = None) -> tuple[Params, tuple[Params, Params]]:
        m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state[0], grads)
        v = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * jnp.square(g), state[1], grads)
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), m, v), (m, v)

    return optax.GradientTransformation(init, update)
