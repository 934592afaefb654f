"""Root-mean-square norm. Statistics are float32 whatever the model computes in."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.core.fields import DType, NonNegative
from moejax.core.layer import RowWise
from moejax.layers.registry import norms


@norms.register("rms_norm")
class RMSNorm(RowWise):
    """Root-mean-square norm with a learned scale (Zhang and Sennrich 2019); Flax's, in the model's dtype."""

    epsilon: NonNegative = 1e-6
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        return nn.RMSNorm(epsilon=self.epsilon, dtype=self.dtype, name="norm")(x)
