"""Deep experts: each is a stack of residual feed-forward sublayers (BASE layers, Lewis et al. 2021)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.core.context import Context
from moejax.core.params import per_expert
from moejax.dispatch.layout import Layout
from moejax.experts.registry import activation, banks, declare

_INIT = per_expert(nn.initializers.lecun_normal())


@banks.register("residual")
class Residual(nn.Module):
    """What `u <- u + W_out act(W_in norm(u))`, `sublayers` times, adds to its input: `f(x) - x`.

    So in a residual block, `x + a (f(x) - x) = a f(x) + (1 - a) x`. W_out starts at zero, f as the identity. The norm is a layer
    norm with scale and bias, of each expert and sublayer.

    Attributes:
      hidden: f, the hidden width.
      num_experts: e.
      sublayers: how many.
      activation: a name of `ACTIVATIONS`.
    """

    hidden: int
    num_experts: int = 1
    sublayers: int = 1
    activation: str = "relu"

    @nn.compact
    def __call__(self, x: Float[Array, "*m d"], layout: Layout, ctx: Context | None = None) -> Float[Array, "*m d"]:
        e, d, f = self.num_experts, x.shape[-1], self.hidden
        declared = {}
        for i in range(self.sublayers):
            declared[f"scale_{i}"] = (nn.initializers.ones, (e, d), ("expert", "embed"))
            declared[f"bias_{i}"] = (nn.initializers.zeros, (e, d), ("expert", "embed"))
            declared[f"w_in_{i}"] = (_INIT, (e, d, f), ("expert", "embed", "mlp"))
            declared[f"w_out_{i}"] = (nn.initializers.zeros, (e, f, d), ("expert", "mlp", "embed"))
        params, axes = declare(self, declared)

        def expert(p: dict[str, Array], x: Array, layout: Layout) -> Array:
            added = jnp.zeros_like(x)
            for i in range(self.sublayers):
                u = jax.nn.standardize((x + added).astype(jnp.float32), epsilon=1e-5)
                u = (u * layout.take(p[f"scale_{i}"]) + layout.take(p[f"bias_{i}"])).astype(x.dtype)
                h = activation(self.activation)(layout.dot(u, p[f"w_in_{i}"]))
                added = added + layout.dot(h, p[f"w_out_{i}"])
            return added

        return layout.map(expert, params, x, axes)
