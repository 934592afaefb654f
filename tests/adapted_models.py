"""Adapted layers and language models, for the tests of adapters."""

import functools

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from moejax import Adapted, Adapter, LoRA, RowWise
from moejax.core.params import param
from moejax.layers.registry import adapters
from moejax.models import build

B, S, D, O, E, R = 2, 4, 5, 3, 4, 2


def inputs(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=(B, S, D))


def around(layer: nn.Module, adapter: Adapter | None = None, **fields) -> Adapted:
    """One layer with an adapter."""
    return Adapted(layer, {"main": adapter or lora(**fields)})


def lora(**fields) -> LoRA:
    return LoRA(**{"rank": R, "scale": 2.0, "targets": ("*",), **fields})


TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 7, (2, 5)))
NORM, MIXER = dict(kind="rms_norm"), dict(kind="attention", num_heads=2)
DENSE = dict(kind="transformer", mixer=MIXER, norm=NORM, ffn=dict(kind="glu", hidden=6))
MOE = dict(
    kind="moe", num_experts=E, router=dict(kind="linear"), select=dict(kind="top_k", k=2), bank=dict(kind="glu", hidden=6),
    backend="reference",  # the quickest to compile
)  # fmt: skip


def spec(scan: bool = True, remat: str = "full", dtype: str = "float32", pattern=("dense",)) -> dict:
    blocks = dict(dense=DENSE, moe={**DENSE, "ffn": MOE})
    return dict(
        kind="decoder_lm", vocab_size=7, d_model=8, num_layers=2 * len(pattern), pattern=pattern, blocks=blocks, scan=scan, remat=remat,
        dtype=dtype, max_length=16,
    )  # fmt: skip


@functools.cache
def language_model(*args, **fields) -> nn.Module:
    return build(spec(*args, **fields))


def mixture(model: nn.Module, targets: tuple[str, ...] = ("*/q", "*/v"), **fields) -> Adapted:
    return around(model, **{"targets": targets, "num_experts": 3, **fields})


def root(scan: bool) -> tuple[str, ...]:
    return ("stack", "repeats", "0_dense") if scan else ("stack", "repeat_0", "0_dense")


def dense(params, x: np.ndarray) -> np.ndarray:
    return x @ np.asarray(params["kernel"], np.float64) + np.asarray(params["bias"], np.float64)


@adapters.register("test_scaled")
class Scaled(Adapter, RowWise):
    """W diag(1 + s): all that a kind needs is what it makes of a matrix."""

    def weight(self, w, site, ctx=None):
        return w * (1 + param(self, "s", nn.initializers.zeros, (site.shape[-1],), (site.axes[-1],)))
