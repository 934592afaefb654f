"""Feed-forward experts: the two-matrix FFN of T5, Switch and ViT."""

import flax.linen as nn
from jaxtyping import Array

from moejax.core.context import Context
from moejax.core.fields import Count, Rate
from moejax.core.initializers.registry import initializers
from moejax.core.initializers.usual import FanIn
from moejax.core.params import Initializer, per_expert
from moejax.dispatch.experts import Experts, Matrices
from moejax.dispatch.layout import Layout
from moejax.experts.base import Bank
from moejax.experts.registry import Activation, activation, banks, declare, dropout, dropout_key

INITS = {"init_in": initializers, "init_out": initializers}


class FFNFields(nn.Module):
    """What there is to choose about a feed-forward expert, or about the dense layer that is one.

    Attributes:
      hidden: f, the hidden width.
      activation: a name of `ACTIVATIONS`; 'gelu' is the tanh form, 'gelu_exact' PyTorch's default.
      use_bias: adds both biases.
      dropout: rate of dropout on the hidden layer in training (Switch fine-tuning: 0.4 inside experts).
      features: output width; the input's by default.
      init_in, init_out: how W_in and W_out start.
    """

    hidden: Count
    activation: Activation = "gelu"
    use_bias: bool = False
    dropout: Rate = 0.0
    features: Count | None = None
    init_in: Initializer = FanIn()
    init_out: Initializer = FanIn()


@banks.register("ffn", slots=INITS)
class FFN(FFNFields, Bank):
    """`act(x W_in + b_in) W_out + b_out` for each of num_experts experts. Fields as in `FFNFields`."""

    num_experts: Count = 1

    @nn.compact
    def __call__(self, width: int, ctx: Context | None = None) -> Experts:
        e, d, f, o = self.num_experts, width, self.hidden, self.features or width
        declared = {
            "w_in": (per_expert(self.init_in), (e, d, f), ("expert", "embed", "mlp")),
            "w_out": (per_expert(self.init_out), (e, f, o), ("expert", "mlp", "embed")),
        }
        if self.use_bias:
            declared["b_in"] = (nn.initializers.zeros, (e, f), ("expert", "mlp"))
            declared["b_out"] = (nn.initializers.zeros, (e, o), ("expert", "embed"))
        params, axes = declare(self, declared)
        act, rate = activation(self.activation), self.dropout

        def expert(p: Matrices, x: Array, layout: Layout, key: Array | None = None) -> Array:
            h = layout.dot(x, p["w_in"])
            if "b_in" in p:
                h = h + layout.take(p["b_in"]).astype(x.dtype)
            h = act(h)
            y = layout.dot(h if key is None else dropout(h, rate, key), p["w_out"])
            return y + layout.take(p["b_out"]).astype(x.dtype) if "b_out" in p else y

        return Experts(expert, params, axes, summed="mlp", key=dropout_key(self, self.dropout, ctx))
