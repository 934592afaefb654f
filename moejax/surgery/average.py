"""Averages of models."""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp

from moejax.core.errors import ConfigError, nearest
from moejax.core.paths import listed
from moejax.surgery.base import Checkpoint, Target, spelt, surgeries

SOURCE = "source"


@surgeries.register("average")
@dataclasses.dataclass(frozen=True)
class Average:
    """The weighted mean of the parameters of several models of one start (Wortsman et al. 2022), taken in float32.

        init = {'source': ..., 'others': {'code': ..., 'prose': ...}, 'surgeries': {'average': {'weights': {'source': 0.5, 'code': 0.5}}}}

    Router state stays that of the source.

    Attributes:
      weights: name in `init.others`, or 'source' -> weight; the source and all others alike if left out. Their sum is taken as it is.

    Raises:
      ConfigError: an unknown name, or models with other parameters.
    """

    weights: Mapping[str, float] | None = None

    def __call__(self, checkpoint: Checkpoint, target: Target) -> Checkpoint:
        models = {SOURCE: checkpoint, **target.others}
        weights = self.weights or dict.fromkeys(models, 1.0 / len(models))
        for name in weights:
            if name not in models:
                raise ConfigError(f"unknown model '{name}' in average.weights{nearest(name, models)}")
        leaves = {name: models[name].leaves for name in weights}
        out = dict(checkpoint.leaves)
        for path, own in out.items():
            if path[0] != "params":
                continue
            parts = {name: found.get(path) for name, found in leaves.items()}
            odd = [name for name, part in parts.items() if part is None or part.shape != own.shape]
            if odd:
                raise ConfigError(f"average: '{spelt(path)}' {list(own.shape)} of the source has no like in {listed(odd)}")
            total = sum(weights[name] * jnp.asarray(part, jnp.float32) for name, part in parts.items())
            out[path] = total.astype(own.dtype)
        return checkpoint.with_leaves(out)
