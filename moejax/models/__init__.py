"""Reference networks made of layers: a config names the parts, `build` makes the network.

The classes are imported on first use: `moejax.layers` registers blocks here while the blocks of this package are made of
layers.
"""

import importlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from moejax.models.registries import blocks, mixers, models

_HOMES = {
    "Attention": "attention",
    "DecoderLM": "lm",
    "MixtureOfHeads": "head_mixture",
    "Nested": "nested",
    "QueryNormHeads": "head_mixture",
    "Stack": "stack",
    "Transformer": "transformer",
    "ViT": "vit",
    "active_params": "inspection",
    "count_params": "inspection",
    "to_scanned": "stack",
    "to_unrolled": "stack",
}

__all__ = ["blocks", "build", "mixers", "models", *_HOMES]


def build(spec: Mapping[str, Any] | Any, where: str = "model", **context: Any) -> nn.Module:
    """The network that `spec` (a mapping or ConfigDict with a `kind`) describes; `where` is its place, for errors.

    `context` fills fields that parts of the network have and the spec leaves out: `backend='grouped'` for all layers, say.

    Raises:
      ConfigError: an unknown kind or key, a field that does not fit, or a part that the network refuses.
    """
    # Each module registers its classes when it is imported.
    for home in (
        "models.attention", "models.head_mixture", "models.transformer", "models.nested", "layers.depth", "models.lm", "models.vit",
    ):  # fmt: skip
        importlib.import_module(f"moejax.{home}")
    return models.build(spec, where, **context)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
