"""The random router, a control."""

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from moejax.core.context import Context
from moejax.routing.routers.base import routers


@routers.register("random")
class Random(nn.Module):
    """Gaussian logits that do not look at the token: the control of what learning to route is worth.

    Outside training the draw is fixed by `eval_seed`, so that evaluation is repeatable.
    """

    num_experts: int
    outputs_per_expert: int = 1
    null_outputs: int = 0
    std: float = 1.0
    eval_seed: int = 0

    @nn.compact
    def __call__(self, x: Float[Array, "g n d"], ctx: Context) -> Float[Array, "g n o"]:
        key = self.make_rng("router") if ctx.train else jax.random.key(self.eval_seed)
        o = self.num_experts * self.outputs_per_expert + self.null_outputs
        return self.std * jax.random.normal(key, (*x.shape[:2], o))
