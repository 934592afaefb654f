"""What a user would pick instead, measured the same way. A peer whose package is missing says so; it is never left out in silence."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from experiments.bench.layer import Layer
from experiments.bench.timing import Foreign
from moejax.core.errors import ConfigError
from moejax.routing import TopK

PEERS = ("ragged_dot", "huggingface")


def ragged_dot(layer: Layer) -> tuple[Callable[..., Array], tuple[Any, ...]]:
    """Rows sorted by expert and `jax.lax.ragged_dot`, as most JAX codebases write it."""
    shape = layer.shape

    def routed(params: Any, x: Array) -> Array:
        plan, p = TopK(k=shape.k)(x @ layer.w + layer.bias), params["params"]
        order = jnp.argsort(plan.expert.reshape(-1), stable=True)
        sizes = jnp.bincount(plan.expert.reshape(-1), length=shape.e).astype(jnp.int32)
        rows = x[0][order // shape.k]
        if shape.glu:
            gate, up = (jax.lax.ragged_dot(rows, p[name], sizes) for name in ("w_gate", "w_up"))
            hidden = jax.nn.silu(gate) * up
        else:
            hidden = jax.nn.gelu(jax.lax.ragged_dot(rows, p["w_in"], sizes))
        out = jax.lax.ragged_dot(hidden, p["w_out"], sizes) * plan.weight.reshape(-1)[order][:, None]
        return jnp.zeros_like(x[0]).at[order // shape.k].add(out)

    return routed, (layer.params, layer.x)


def huggingface(layer: Layer) -> Foreign:
    """Mixtral's sparse block of `transformers`, forward only, on torch's threads. GLU shapes are the like for like."""
    try:
        import torch
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    except ImportError as error:
        raise ConfigError(
            f"--against=huggingface needs torch and transformers: pip install torch transformers ({error})"
        ) from None
    shape = layer.shape
    config = MixtralConfig(
        hidden_size=shape.d, intermediate_size=shape.f, num_local_experts=shape.e, num_experts_per_tok=shape.k
    )
    block = MixtralSparseMoeBlock(config).eval()
    x = torch.randn(1, shape.n, shape.d)

    def call() -> None:
        with torch.no_grad():
            block(x)

    return Foreign(call)
