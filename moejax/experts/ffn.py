"""Feed-forward experts: the two-matrix FFN of T5, Switch and ViT, and the gated one of Llama and Mixtral."""

import flax.linen as nn
from jaxtyping import Array, Float

from moejax.core.context import Context
from moejax.core.params import Initializer, per_expert
from moejax.dispatch.layout import Layout
from moejax.experts.registry import activation, banks, declare, dropout

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
        e, d, f, o = self.num_experts, x.shape[-1], self.hidden, self.features or x.shape[-1]
        init_in, init_out = self.initializers(d)
        declared = {
            "w_in": (init_in, (e, d, f), ("expert", "embed", "mlp")),
            "w_out": (init_out, (e, f, o), ("expert", "mlp", "embed")),
        }
        if self.use_bias:
            declared["b_in"] = (nn.initializers.zeros, (e, f), ("expert", "mlp"))
            declared["b_out"] = (nn.initializers.zeros, (e, o), ("expert", "embed"))
        params, axes = declare(self, declared)

        def expert(p: dict[str, Array], x: Array, layout: Layout, key: Array | None = None) -> Array:
            h = layout.dot(x, p["w_in"])
            if self.use_bias:
                h = h + layout.take(p["b_in"]).astype(x.dtype)
            h = activation(self.activation)(h)
            y = layout.dot(h if key is None else dropout(h, self.dropout, key), p["w_out"])
            return y + layout.take(p["b_out"]).astype(x.dtype) if self.use_bias else y

        return layout.map(expert, params, x, axes, summed="mlp", key=_dropout_key(self, ctx))

    def initializers(self, d: int) -> tuple[Initializer, Initializer]:
        """How W_in and W_out start, for tokens of width d: by the fan-in of one expert."""
        return _INIT, _INIT


@banks.register("glu")
class GLU(nn.Module):
    """`(act(x W_gate) * (x W_up)) W_out` (Shazeer 2020; SwiGLU with silu). Fields as in `FFN`.

    Attributes:
      scaled: multiplies the hidden layer by a learned vector, 1 at the start (ST-MoE's multiplicative bias).
    """

    hidden: int
    num_experts: int = 1
    activation: str = "silu"
    dropout: float = 0.0
    features: int | None = None
    scaled: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*m d"], layout: Layout, ctx: Context | None = None) -> Float[Array, "*m o"]:
        e, d, f, o = self.num_experts, x.shape[-1], self.hidden, self.features or x.shape[-1]
        declared = {
            "w_gate": (_INIT, (e, d, f), ("expert", "embed", "mlp")),
            "w_up": (_INIT, (e, d, f), ("expert", "embed", "mlp")),
            "w_out": (_INIT, (e, f, o), ("expert", "mlp", "embed")),
        }
        if self.scaled:
            declared["scale"] = (nn.initializers.ones, (e, f), ("expert", "mlp"))
        params, axes = declare(self, declared)

        def expert(p: dict[str, Array], x: Array, layout: Layout, key: Array | None = None) -> Array:
            h = layout.glu(x, p["w_gate"], p["w_up"], activation(self.activation))
            if self.scaled:
                h = h * layout.take(p["scale"]).astype(x.dtype)
            return layout.dot(h if key is None else dropout(h, self.dropout, key), p["w_out"])

        return layout.map(expert, params, x, axes, summed="mlp", key=_dropout_key(self, ctx))


def _dropout_key(bank: FFN | GLU, ctx: Context | None) -> Array | None:
    """A key in training, if there is anything to drop."""
    return bank.make_rng("dropout") if bank.dropout and ctx is not None and ctx.train else None
