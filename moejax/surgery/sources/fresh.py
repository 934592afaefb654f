"""Untrained."""

import dataclasses

from moejax.surgery.base import Checkpoint
from moejax.surgery.sources.base import Reader, Source, sources


@sources.register("fresh")
@dataclasses.dataclass(frozen=True)
class FreshSource(Source):
    """The model's own initialisers, by the run's seed."""

    def read(self, reader: Reader) -> Checkpoint:
        """See the class."""
        return reader.fresh()
