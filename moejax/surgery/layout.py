"""From layers stacked by a scan to layers by name, and back."""

import dataclasses

from moejax.models.stack import to_scanned, to_unrolled
from moejax.surgery.base import Checkpoint, Target, surgeries


@surgeries.register("unroll")
@dataclasses.dataclass(frozen=True)
class Unroll:
    """A model that was trained with `model.scan=True`, for one with `scan=False`: each layer's arrays under a name of their own.

    Single layers can then be named: in `trainable`, or by other surgeries.
    """

    def __call__(self, checkpoint: Checkpoint, target: Target) -> Checkpoint:
        return checkpoint._replace(variables=to_unrolled(checkpoint.variables))


@surgeries.register("roll")
@dataclasses.dataclass(frozen=True)
class Roll:
    """The inverse of `Unroll`: a model that was trained with `model.scan=False`, for one with `scan=True`."""

    def __call__(self, checkpoint: Checkpoint, target: Target) -> Checkpoint:
        return checkpoint._replace(variables=to_scanned(checkpoint.variables))
