"""Deep experts: each is a stack of residual feed-forward sublayers (BASE layers, Lewis et al. 2021)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from moejax.core.context import Context
from moejax.core.fields import Count, Few
from moejax.core.initializers.usual import FanIn, Zeros
from moejax.core.params import Initializer, per_expert
from moejax.dispatch.experts import Experts, Matrices
from moejax.dispatch.layout import Layout
from moejax.experts.base import Bank
from moejax.experts.ffn import INITS
from moejax.experts.registry import Activation, activation, banks, declare


@banks.register("residual", slots=INITS)
class Residual(Bank):
    """What `u <- u + W_out act(W_in norm(u))`, `sublayers` times, adds to its input: `f(x) - x`.

    So in a residual block, `x + a (f(x) - x) = a f(x) + (1 - a) x`. With W_out starting at zero, f starts as the identity. The norm is a layer
    norm with scale and bias, of each expert and sublayer.

    Attributes:
      hidden: f, the hidden width.
      num_experts: e.
      sublayers: how many.
      activation: a name of `ACTIVATIONS`.
      init_in, init_out: how each W_in and W_out starts.
    """

    hidden: Count
    num_experts: Count = 1
    sublayers: Few = 1
    activation: Activation = "relu"
    init_in: Initializer = FanIn()
    init_out: Initializer = Zeros()

    @nn.compact
    def __call__(self, width: int, ctx: Context | None = None) -> Experts:
        e, d, f, sublayers, act = self.num_experts, width, self.hidden, self.sublayers, activation(self.activation)
        declared = {}
        for i in range(sublayers):
            declared[f"scale_{i}"] = (nn.initializers.ones, (e, d), ("expert", "embed"))
            declared[f"bias_{i}"] = (nn.initializers.zeros, (e, d), ("expert", "embed"))
            declared[f"w_in_{i}"] = (per_expert(self.init_in), (e, d, f), ("expert", "embed", "mlp"))
            declared[f"w_out_{i}"] = (per_expert(self.init_out), (e, f, d), ("expert", "mlp", "embed"))
        params, axes = declare(self, declared)

        def expert(p: Matrices, x: Array, layout: Layout) -> Array:
            added = jnp.zeros_like(x)
            for i in range(sublayers):
                u = jax.nn.standardize((x + added).astype(jnp.float32), epsilon=1e-5)
                u = (u * layout.take(p[f"scale_{i}"]) + layout.take(p[f"bias_{i}"])).astype(x.dtype)
                h = act(layout.dot(u, p[f"w_in_{i}"]))
                added = added + layout.dot(h, p[f"w_out_{i}"])
            return added

        return Experts(expert, params, axes)
