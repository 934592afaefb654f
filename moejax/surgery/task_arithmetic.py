"""Sums of task vectors."""

import dataclasses
from collections.abc import Mapping

from moejax.core.errors import ConfigError, nearest
from moejax.surgery.base import surgeries
from moejax.surgery.task_vectors import OnTaskVectors, Vector


@surgeries.register("task_arithmetic")
@dataclasses.dataclass(frozen=True)
class TaskArithmetic(OnTaskVectors):
    """`theta = theta_0 + sum_t scale_t * (theta_t - theta_0)` (Ilharco et al. 2023).

        init = {'source': start, 'others': {'code': ..., 'prose': ...}, 'surgeries': {'task_arithmetic': {'scale': 0.4}}}

    One scale for all adds tasks up (`1 / T` averages T models); a negative one forgets; `{'a': -1, 'b': 1, 'c': 1}` is the analogy
    "a is to b as c is to the new one". A scale is tuned on validation data. Other fields as in `OnTaskVectors`.

    Attributes:
      scale: of all, or name in `init.others` -> of that one; those without a name are left out.

    Raises:
      ConfigError: a scale for a model that is not there.
    """

    scale: float | Mapping[str, float] = 0.4

    def merged(self, vectors: Mapping[str, Vector]) -> Vector:
        scales = self.scale if isinstance(self.scale, Mapping) else dict.fromkeys(vectors, self.scale)
        for name in scales:
            if name not in vectors:
                raise ConfigError(f"unknown model '{name}' in task_arithmetic.scale{nearest(name, vectors)}")
        paths = next(iter(vectors.values()))
        return {path: sum(scales[name] * vectors[name][path] for name in scales) for path in paths}
