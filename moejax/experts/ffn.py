"""Feed-forward experts: the two-matrix FFN of T5, Switch and ViT, and the gated one of Llama and Mixtral."""

import flax.linen as nn
from jaxtyping import Array, Float

from moejax.context import Context
from moejax.dispatch.layout import Layout
from moejax.experts.registry import activation, banks
from moejax.params import param, per_expert

_INIT = per_expert(nn.initializers.lecun_normal())


@banks.register("ffn")
class FFN(nn.Module):
    """`act(x W_in + b_in) W_out + b_out` for each of num_experts experts.

    Attributes:
      hidden: f, the hidden width.
      num_experts: e.
      activation: a name of `ACTIVATIONS`.
      use_bias: adds both biases.
      dropout: rate of dropout on the hidden layer in training (Switch fine-tuning: 0.4 inside experts).
      features: output width; the input's by default.
    """

    hidden: int
    num_experts: int = 1
    activation: str = "gelu"
    use_bias: bool = False
    dropout: float = 0.0
    features: int | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*m d"], layout: Layout, ctx: Context | None = None) -> Float[Array, "*m o"]:
        e, d, f = self.num_experts, x.shape[-1], self.hidden
        o = self.features or d
        h = layout.dot(x, param(self, "w_in", _INIT, (e, d, f), ("expert", "embed", "mlp")))
        if self.use_bias:
            h = h + layout.take(param(self, "b_in", nn.initializers.zeros, (e, f), ("expert", "mlp"))).astype(x.dtype)
        h = _dropout(activation(self.activation)(h), self.dropout, ctx)
        y = layout.dot(h, param(self, "w_out", _INIT, (e, f, o), ("expert", "mlp", "embed")))
        if self.use_bias:
            y = y + layout.take(param(self, "b_out", nn.initializers.zeros, (e, o), ("expert", "embed"))).astype(x.dtype)
        return y


@banks.register("glu")
class GLU(nn.Module):
    """`(act(x W_gate) * (x W_up)) W_out` (Shazeer 2020; SwiGLU with silu). Fields as in `FFN`."""

    hidden: int
    num_experts: int = 1
    activation: str = "silu"
    dropout: float = 0.0
    features: int | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*m d"], layout: Layout, ctx: Context | None = None) -> Float[Array, "*m o"]:
        e, d, f = self.num_experts, x.shape[-1], self.hidden
        gate = layout.dot(x, param(self, "w_gate", _INIT, (e, d, f), ("expert", "embed", "mlp")))
        up = layout.dot(x, param(self, "w_up", _INIT, (e, d, f), ("expert", "embed", "mlp")))
        h = _dropout(activation(self.activation)(gate) * up, self.dropout, ctx)
        return layout.dot(h, param(self, "w_out", _INIT, (e, f, self.features or d), ("expert", "mlp", "embed")))


def _dropout(h: Array, rate: float, ctx: Context | None) -> Array:
    if not rate:
        return h
    return nn.Dropout(rate, deterministic=ctx is None or not ctx.train)(h)
