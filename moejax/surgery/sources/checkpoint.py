"""A checkpoint that is there."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moejax.core.errors import ConfigError
from moejax.core.fields import Whole
from moejax.surgery.base import Checkpoint
from moejax.surgery.sources.base import Reader, Source, network_of, sources


@sources.register("checkpoint")
@dataclasses.dataclass(frozen=True)
class CheckpointSource(Source):
    """What a training left in its folder.

    Attributes:
      path: the run's folder, which has `checkpoints/` in it, or one of the checkpoints in there.
      step: which checkpoint of a run; None takes the newest.

    Raises:
      ConfigError: the path is of one checkpoint, and there is a step besides.
    """

    path: str
    step: Whole | None = None

    def __post_init__(self):
        if self.step is not None and _is_checkpoint(Path(self.path)):
            raise ConfigError(f"path='{self.path}' is a checkpoint, and step={self.step} asks for one; give one of them")

    @property
    def place(self) -> tuple[str, int | None]:
        """The run's folder, and the step."""
        path = Path(self.path)
        return (str(path.parents[1]), int(path.name)) if _is_checkpoint(path) else (self.path, self.step)

    def read(self, reader: Reader) -> Checkpoint:
        """See the class."""
        return reader.load(*self.place)

    def network(self, reader: Reader) -> Mapping[str, Any]:
        """Of the checkpoint's config."""
        return network_of(reader.config_of(*self.place))


def _is_checkpoint(path: Path) -> bool:
    return path.parent.name == "checkpoints" and re.fullmatch(r"0|[1-9][0-9]*", path.name) is not None
