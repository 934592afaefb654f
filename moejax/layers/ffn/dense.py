"""Dense feed-forward layers: a bank of one expert that every token uses, so that dense and routed layers share their code."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.core.context import Context
from moejax.core.layer import RowWise
from moejax.core.params import whole
from moejax.dispatch.layout import Batched
from moejax.experts.base import experts_of
from moejax.experts.ffn import FFN, INITS, FFNFields
from moejax.experts.glu import GLU, GLUFields
from moejax.layers.registry import ffns


@ffns.register("ffn", slots=INITS)
class DenseFFN(FFNFields, RowWise):
    """The two-matrix feed-forward layer; fields as in `moejax.experts.FFNFields`."""

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"], ctx: Context | None = None) -> Float[Array, "b s o"]:
        return run_single(FFN(**_fields(self, FFNFields), name="expert"), x, ctx or Context())


@ffns.register("glu", slots=INITS)
class DenseGLU(GLUFields, RowWise):
    """The gated feed-forward layer; fields as in `moejax.experts.GLUFields`."""

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"], ctx: Context | None = None) -> Float[Array, "b s o"]:
        return run_single(GLU(**_fields(self, GLUFields), name="expert"), x, ctx or Context())


def run_single(bank: nn.Module, x: Float[Array, "*b d"], ctx: Context) -> Float[Array, "*b o"]:
    """Runs a bank of one expert on every row."""
    with whole("expert"):
        y = experts_of(bank, x.shape[-1], ctx).run(x.reshape(1, -1, x.shape[-1]), Batched())
    return y.reshape(*x.shape[:-1], y.shape[-1])


def sum_shared(bank: nn.Module, x: Float[Array, "*b d"], ctx: Context) -> Float[Array, "*b o"]:
    """Runs every expert of a bank on every row and sums the outputs: shared experts."""
    rows = x.reshape(-1, x.shape[-1])
    with whole("expert"):
        experts = experts_of(bank, x.shape[-1], ctx)
        y = experts.run(jnp.broadcast_to(rows, (experts.num_experts, *rows.shape)), Batched()).sum(0)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _fields(layer: nn.Module, fields: type) -> dict[str, Any]:
    """The layer's values of the fields that it shares with a bank."""
    return {f.name: getattr(layer, f.name) for f in dataclasses.fields(fields) if f.name not in ("parent", "name")}
