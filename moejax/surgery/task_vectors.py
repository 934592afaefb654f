"""Task vectors: what fine-tuning added to a model, and operations on several of them."""

import dataclasses
from collections.abc import Mapping

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from moejax.core.errors import ConfigError
from moejax.core.fields import Rate
from moejax.core.params import Path
from moejax.core.paths import find, listed
from moejax.surgery.base import Checkpoint, Target, spelt

# Path -> float32 array.
Vector = Mapping[Path, np.ndarray]


@dataclasses.dataclass(frozen=True)
class OnTaskVectors:
    """What all operations on task vectors share: `theta = theta_0 + merged(tau_1, ..., tau_T)` with `tau_t = theta_t - theta_0`.

    theta_0 is the source, theta_t are `init.others`, fine-tuned from the very same theta_0. All is done in float32; what is no parameter
    (router state) stays that of theta_0. With `drop`, vectors are first thinned out (DARE, Yu et al. 2023): each entry is dropped with
    this probability, by each model's own draws, and the others are divided by `1 - drop`, so that the mean stays.

    Attributes:
      paths, without: patterns of the parameters that are merged, and of those that are not all the same. Others stay those of theta_0.
      drop: share of entries that is dropped.
      rescale: divides what stays by `1 - drop`.

    Raises:
      ConfigError: no others, models with other parameters, a pattern that matches nothing, or an adapter's factors: only their
        products can be added up.
    """

    paths: tuple[str, ...] = ("*",)
    without: tuple[str, ...] = ()
    drop: Rate = 0.0
    rescale: bool = True

    def __call__(self, checkpoint: Checkpoint, target: Target) -> Checkpoint:
        leaves = checkpoint.leaves
        if not target.others:
            raise ConfigError("no task vector without init.others: models that were fine-tuned from init.source")
        paths = self._merged_paths(checkpoint, target)
        vectors = {
            name: {path: np.asarray(other.leaves[path], np.float32) - np.asarray(leaves[path], np.float32) for path in paths}
            for name, other in sorted(target.others.items())
        }
        if self.drop:
            keys = jax.random.split(target.key, len(vectors))
            vectors = {name: self._thinned(vector, key) for (name, vector), key in zip(vectors.items(), keys, strict=True)}
        moved = self.merged(vectors)
        new = {path: (np.asarray(leaves[path], np.float32) + moved[path]).astype(leaves[path].dtype) for path in paths}
        return checkpoint.with_leaves({**leaves, **new})

    def merged(self, vectors: Mapping[str, Vector]) -> Vector:
        """One vector of those of all models, by name in `init.others`."""
        raise NotImplementedError

    def _merged_paths(self, checkpoint: Checkpoint, target: Target) -> list[Path]:
        place = type(self).__name__
        models = {"source": checkpoint, **dict(sorted(target.others.items()))}
        named = {name: {spelt(path): path for path in model.leaves if path[0] == "params"} for name, model in models.items()}
        # A head that only the fine-tuned models have may be left out too.
        every = sorted(set().union(*named.values()))
        hits = {name for pattern in self.paths for name in find(pattern, every, f"{place}.paths")}
        hits -= {name for pattern in self.without for name in find(pattern, every, f"{place}.without")}
        own, leaves = {name: named["source"][name] for name in sorted(hits & named["source"].keys())}, checkpoint.leaves
        for name, other in target.others.items():
            odd, arrays = sorted((hits & named[name].keys()) ^ own.keys()), other.leaves
            odd += [part for part, path in own.items() if path in arrays and arrays[path].shape != leaves[path].shape]
            if odd:
                raise ConfigError(f"{place}: '{name}' of init.others is no fine-tuned source: it differs in {listed(odd)}")
        known = flax.traverse_util.flatten_dict({"params": target.parameters})
        adapters = [name for name, path in own.items() if path in known and "adapters" in known[path].roles]
        if adapters:
            raise ConfigError(
                f"{place}: {listed(adapters)} are an adapter's factors, and only their products can be added up; merge adapters into "
                "their weights first, or leave them out (without)"
            )
        return list(own.values())

    def _thinned(self, vector: Vector, key: jax.Array) -> Vector:
        factor = 1.0 / (1.0 - self.drop) if self.rescale else 1.0
        keys = jax.random.split(key, len(vector))
        stays = {p: jax.random.bernoulli(k, 1.0 - self.drop, vector[p].shape) for p, k in zip(vector, keys, strict=True)}
        return {path: np.asarray(jnp.where(stays[path], x * factor, 0.0), np.float32) for path, x in vector.items()}
