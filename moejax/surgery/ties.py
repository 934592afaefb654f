"""Sums of task vectors without their conflicts."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Literal

import numpy as np
from jaxtyping import Float, Shaped

from moejax.core.fields import In
from moejax.surgery.base import surgeries
from moejax.surgery.task_vectors import OnTaskVectors, Vector


@surgeries.register("ties")
@dataclasses.dataclass(frozen=True)
class Ties(OnTaskVectors):
    """`theta = theta_0 + scale * tau`: trim, elect a sign, merge what agrees (TIES-Merging, Yadav et al. 2023).

    1. Of each task vector the largest entries stay, over the whole model at once; the others become 0.
    2. Each entry's sign is that of the sum over tasks; where the sum is 0, that of most other entries.
    3. tau is the mean of the entries that are not 0 and have that sign.

    Scales are not those of `TaskArithmetic`: a mean over those who agree is larger than one over all. Other fields as in
    `OnTaskVectors`.

    Attributes:
      keep: share of the entries that stays, K.
      scale: lambda; 1 where nothing is tuned.
      combine: the 'mean' of those who agree, their 'sum', or the one of the largest size ('max').

    Raises:
      ConfigError: a share that is not in (0, 1].
    """

    keep: Annotated[float, In(above=0, most=1)] = 0.2
    scale: float = 1.0
    combine: Literal["mean", "sum", "max"] = "mean"

    def merged(self, vectors: Mapping[str, Vector]) -> Vector:
        paths = list(next(iter(vectors.values())))
        flat = np.stack([np.concatenate([vector[path].ravel() for path in paths]) for vector in vectors.values()])
        tau = self.scale * self._agreed(np.stack([trimmed(vector, self.keep) for vector in flat]))
        shapes = [next(iter(vectors.values()))[path].shape for path in paths]
        ends = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]
        return {path: part.reshape(shape) for path, shape, part in zip(paths, shapes, np.split(tau, ends), strict=True)}

    def _agreed(self, vectors: Float[np.ndarray, "t n"]) -> Float[np.ndarray, "n"]:
        agrees = (np.sign(vectors) == elected(vectors)) & (vectors != 0)
        kept = np.where(agrees, vectors, 0.0)
        if self.combine == "max":
            return np.take_along_axis(kept, np.abs(kept).argmax(0)[None], 0)[0]
        total = kept.sum(0)
        return total / np.maximum(agrees.sum(0), 1).astype(np.float32) if self.combine == "mean" else total


def trimmed(vector: Float[np.ndarray, "n"], keep: float) -> Float[np.ndarray, "n"]:
    """The largest entries of a vector, exactly this share of them; of equal ones the first."""
    size, n = np.abs(vector), len(vector)
    count = max(round(keep * n), 1)
    least = np.partition(size, n - count)[n - count]
    stays = size > least
    stays[np.flatnonzero(size == least)[: count - stays.sum()]] = True
    return np.where(stays, vector, np.zeros_like(vector))


def elected(vectors: Float[np.ndarray, "t n"]) -> Shaped[np.ndarray, "n"]:
    """The sign of each entry's sum; where that is 0, the sign that most entries have."""
    sign = np.sign(vectors.sum(0))
    return np.where(sign == 0, np.sign(sign.sum()), sign)
