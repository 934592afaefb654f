"""Gated feed-forward experts, those of Llama and Mixtral."""

import flax.linen as nn
from jaxtyping import Array

from moejax.core.context import Context
from moejax.core.fields import Count, Rate
from moejax.core.initializers.usual import FanIn
from moejax.core.params import Initializer, per_expert
from moejax.dispatch.experts import Experts, Matrices
from moejax.dispatch.layout import Layout
from moejax.experts.base import Bank
from moejax.experts.ffn import INITS
from moejax.experts.registry import Activation, activation, banks, declare, dropout, dropout_key


class GLUFields(nn.Module):
    """What there is to choose about a gated expert, or about the dense layer that is one. As in `FFNFields`, and

    Attributes:
      scaled: multiplies the hidden layer by a learned vector, 1 at the start (ST-MoE's multiplicative bias).
      init_in: how W_gate and W_up start.
    """

    hidden: Count
    activation: Activation = "silu"
    dropout: Rate = 0.0
    features: Count | None = None
    scaled: bool = False
    init_in: Initializer = FanIn()
    init_out: Initializer = FanIn()


@banks.register("glu", slots=INITS)
class GLU(GLUFields, Bank):
    """`(act(x W_gate) * (x W_up)) W_out` (Shazeer 2020; SwiGLU with silu) for each of num_experts experts. Fields as in `GLUFields`."""

    num_experts: Count = 1

    @nn.compact
    def __call__(self, width: int, ctx: Context | None = None) -> Experts:
        e, d, f, o = self.num_experts, width, self.hidden, self.features or width
        declared = {
            "w_gate": (per_expert(self.init_in), (e, d, f), ("expert", "embed", "mlp")),
            "w_up": (per_expert(self.init_in), (e, d, f), ("expert", "embed", "mlp")),
            "w_out": (per_expert(self.init_out), (e, f, o), ("expert", "mlp", "embed")),
        }
        if self.scaled:
            declared["scale"] = (nn.initializers.ones, (e, f), ("expert", "mlp"))
        params, axes = declare(self, declared)
        act, rate = activation(self.activation), self.dropout

        def expert(p: Matrices, x: Array, layout: Layout, key: Array | None = None) -> Array:
            h = layout.glu(x, p["w_gate"], p["w_up"], act)
            if "scale" in p:
                h = h * layout.take(p["scale"]).astype(x.dtype)
            return layout.dot(h if key is None else dropout(h, rate, key), p["w_out"])

        return Experts(expert, params, axes, summed="mlp", key=dropout_key(self, self.dropout, ctx))
