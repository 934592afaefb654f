"""The registry of whole networks, and building one from a config."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from moejax.core.registry import Registry
from moejax.layers.adapters.adapted import adapt

models = Registry("model", "moejax.models")


def build(spec: Mapping[str, Any] | Any, where: str = "model", **context: Any) -> nn.Module:
    """The network that `spec` (a mapping or ConfigDict with a `kind`) describes; `where` is its place, for errors.

    `context` fills fields that parts of the network have and the spec leaves out: `backend='grouped'` for all layers, say.

    Raises:
      ConfigError: an unknown kind or key, a field that does not fit, or a part that the network refuses.
    """
    return models.build(spec, where, **context)


def network(config: Mapping[str, Any], where: str = "", **context: Any) -> nn.Module:
    """The network of a run's config: `config.model`, with `config.adapters` around its layers; `where` is its place, for errors.

    Raises:
      ConfigError: as `build`; or an unknown kind of adapter, or one that looks at later tokens in a decoder.
    """
    place = f"{where}." if where else ""
    return adapt(build(config["model"], where or "model", **context), config.get("adapters"), f"{place}adapters")
