"""Layer norm. Statistics are float32 whatever the model computes in."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.core.fields import DType, NonNegative
from moejax.core.layer import RowWise
from moejax.layers.registry import norms


@norms.register("layer_norm")
class LayerNorm(RowWise):
    """Layer norm with learned scale and bias (Ba et al. 2016); Flax's, in the model's dtype."""

    epsilon: NonNegative = 1e-6
    use_bias: bool = True
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        return nn.LayerNorm(epsilon=self.epsilon, use_bias=self.use_bias, dtype=self.dtype, name="norm")(x)
