"""The root-mean-square norm whose statistic is that of the first few features only."""

import math
from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.core.fields import DType, In, NonNegative
from moejax.core.layer import RowWise
from moejax.core.params import param
from moejax.layers.registry import norms


@norms.register("partial_rms_norm")
class PartialRMSNorm(RowWise):
    """`y = g * x / sqrt(mean(x[:k]^2) + epsilon)` with `k = ceil(fraction * d)` (pRMSNorm, Zhang and Sennrich 2019, section 4).

    All features are scaled, by a statistic of the first k. With `fraction=1` it is `RMSNorm`. The statistic and the product with g
    are float32 whatever the model computes in.

    Attributes:
      fraction: p, the share of the features that is measured; the paper's is 6.25 %.
      epsilon: added to the mean square, under the root.
      dtype: of what comes out.

    Raises:
      ConfigError: a share that is not in (0, 1].
    """

    fraction: Annotated[float, In(above=0, most=1)] = 0.0625
    epsilon: NonNegative = 1e-6
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        d = x.shape[-1]
        scale = param(self, "scale", nn.initializers.ones, (d,), (None,))
        x = x.astype(jnp.float32)
        # Rounded before it is rounded up: 0.07 * 100 is a little more than 7.
        measured = x[..., : math.ceil(round(self.fraction * d, 6))]
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(measured), -1, keepdims=True) + self.epsilon)
        return (x * inverse * scale).astype(self.dtype)
