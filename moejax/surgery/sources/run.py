"""The run of another config."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from moejax.core.fields import Seed
from moejax.surgery.base import Checkpoint
from moejax.surgery.sources.base import Reader, Source, network_of, sources

OWN = "own"


@sources.register("run")
@dataclasses.dataclass(frozen=True)
class RunSource(Source):
    """The end of the run of another config, which is trained when somebody first asks for it and shared by all who do.

    A study writes `{'kind': 'run', 'arm': 'dense'}` instead of the config: an arm or a start of its own, or of another `study`.

    Attributes:
      config: a whole config, with sections model, data, task, optimizer and train. It may have an `init` of its own.
      seed: 'own' trains one for each seed of the run that asks; a number trains one for all.
    """

    config: Mapping[str, Any]
    seed: Seed | Literal["own"] = OWN

    def read(self, reader: Reader) -> Checkpoint:
        """See the class."""
        return reader.train(self.config, reader.seed if self.seed == OWN else int(self.seed))

    def network(self, reader: Reader) -> Mapping[str, Any]:
        """Of the config: nothing has to be trained to know it."""
        return network_of(self.config)
