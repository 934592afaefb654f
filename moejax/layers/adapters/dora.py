"""Low-rank adapters of a matrix's direction, with a magnitude of its own for each output (DoRA, Liu et al. 2024)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.core.fields import Count
from moejax.core.layer import RowWise
from moejax.core.params import param
from moejax.layers.adapters.base import Adapter, Site
from moejax.layers.registry import adapters

# Kaiming-uniform with a = sqrt(5): U(-1/sqrt(d), 1/sqrt(d)).
_UNIFORM = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


@adapters.register("dora")
class DoRA(Adapter, RowWise):
    """`W' = m V / |V|` with `V = W + scale * A B`; the norm is over the inputs, one for each output (Liu et al. 2024, eq. 5).

    `m[o]` starts as the norms of W and `B` as zeros, so nothing changes at the start. The norm passes no gradient (section 4.3). A bias
    stays as it is. The adapted matrix is made once for each call, and merges.

        model = Adapted(model, {"main": DoRA(rank=8, scale=2.0, targets=("*/q", "*/v"))})

    Attributes:
      rank: r.
      scale: explicit; alpha / r in the paper.
      train_norm: lets the gradient through the norm: the paper's ablation of what stopping it costs.
    """

    rank: Count | None = None
    scale: float | None = None
    train_norm: bool = False

    def __post_init__(self) -> None:
        if self.rank is None or self.scale is None:
            raise ConfigError("DoRA needs a rank and a scale: alpha / rank in the paper, and never implied")
        super().__post_init__()

    def weight(self, w: Float[Array, "d o"], site: Site, ctx: Context | None = None) -> Float[Array, "d o"]:
        (d, o), (inner, outer) = site.shape, site.axes
        a = param(self, "a", _UNIFORM, (d, self.rank), (inner, "rank"))
        b = param(self, "b", nn.initializers.zeros, (self.rank, o), ("rank", outer))
        magnitude = param(self, "m", lambda key, shape, dtype=jnp.float32: _norm(w).astype(dtype), (o,), (outer,))
        v = w.astype(jnp.float32) + self.scale * jnp.matmul(a, b, precision="highest")
        norm = _norm(v) if self.train_norm else jax.lax.stop_gradient(_norm(v))
        return (v * (magnitude / norm)).astype(w.dtype)


def _norm(w: Float[Array, "d o"]) -> Float[Array, "o"]:
    """Of the vector that makes each output; 1 for one of zeros, which has no direction."""
    square = jnp.sum(jnp.square(w.astype(jnp.float32)), axis=0)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 1.0)
