"""Dense feed-forward layers: a bank of one expert that every token uses, so that dense and routed layers share their code."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.core.context import Context
from moejax.core.layer import RowWise
from moejax.core.params import whole
from moejax.dispatch.layout import Batched
from moejax.experts.ffn import FFN, GLU
from moejax.layers.registry import ffns


def run_single(bank: nn.Module, x: Float[Array, "*b d"], ctx: Context) -> Float[Array, "*b o"]:
    """Runs a bank of one expert on every row."""
    with whole("expert"):
        y = bank(x.reshape(1, -1, x.shape[-1]), Batched(), ctx)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def sum_shared(bank: nn.Module, x: Float[Array, "*b d"], ctx: Context) -> Float[Array, "*b o"]:
    """Runs every expert of a bank on every row and sums the outputs: shared experts."""
    rows = x.reshape(-1, x.shape[-1])
    with whole("expert"):
        y = bank(jnp.broadcast_to(rows, (bank.num_experts, *rows.shape)), Batched(), ctx).sum(0)
    return y.reshape(*x.shape[:-1], y.shape[-1])


@ffns.register("ffn")
class DenseFFN(RowWise):
    """The two-matrix feed-forward layer; fields as in `moejax.experts.FFN`."""

    hidden: int
    activation: str = "gelu"
    use_bias: bool = False
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"], ctx: Context | None = None) -> Float[Array, "b s d"]:
        bank = FFN(self.hidden, activation=self.activation, use_bias=self.use_bias, dropout=self.dropout, name="expert")
        return run_single(bank, x, ctx or Context())


@ffns.register("glu")
class DenseGLU(RowWise):
    """The gated feed-forward layer; fields as in `moejax.experts.GLU`."""

    hidden: int
    activation: str = "silu"
    dropout: float = 0.0
    scaled: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"], ctx: Context | None = None) -> Float[Array, "b s d"]:
        bank = GLU(self.hidden, activation=self.activation, dropout=self.dropout, scaled=self.scaled, name="expert")
        return run_single(bank, x, ctx or Context())
