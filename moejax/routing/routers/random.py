"""The random router, a control."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.core.context import Context
from moejax.core.fields import NonNegative, Seed
from moejax.core.layer import RowWise
from moejax.routing.routers.base import Router, routers


@routers.register("random")
class Random(Router, RowWise):
    """Gaussian logits that do not look at the token: the control of what learning to route is worth.

    Outside training the draw follows from `eval_seed`, the layer and the token's position alone: evaluation is repeatable, layers
    differ, and decoding token by token gives what a whole forward pass gives.
    """

    std: NonNegative = 1.0
    eval_seed: Seed = 0

    @nn.compact
    def __call__(self, x: Float[Array, "g n d"], ctx: Context) -> Float[Array, "g n o"]:
        if ctx.train:
            return self.std * jax.random.normal(self.make_rng("router"), (*x.shape[:2], self.num_outputs))
        layer = jax.random.fold_in(jax.random.key(self.eval_seed), 0 if ctx.layer is None else ctx.layer)

        def draw(position: Int[Array, ""]) -> Float[Array, "o"]:
            return jax.random.normal(jax.random.fold_in(layer, position), (self.num_outputs,))

        everywhere = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        return self.std * jax.vmap(jax.vmap(draw))(everywhere if ctx.positions is None else ctx.positions)
