"""What a source of parameters is, and what the trainer lends it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from moejax.core.errors import ConfigError
from moejax.core.registry import Registry
from moejax.surgery.base import Checkpoint

sources = Registry("source", "moejax.surgery.sources")


@dataclasses.dataclass(frozen=True)
class Reader:
    """What a source may use.

    Attributes:
      place: where the source is written ('init.source', 'task.teacher'), for errors and progress.
      seed: of the run that asks.
      fresh: the untrained model of the run that asks, as a checkpoint.
      load: `load(path, step)`: the checkpoint in a run's folder; the newest if step is None.
      config_of: `config_of(path, step)`: its plain config alone.
      published: `published(name)`: a published model, by its name or path, as a checkpoint.
      published_config: its plain config alone.
      train: `train(config, seed)`: the last checkpoint of the run of a config, which is trained now unless it has been.
    """

    place: str
    seed: int
    fresh: Callable[[], Checkpoint]
    load: Callable[[str, int | None], Checkpoint]
    config_of: Callable[[str, int | None], Mapping[str, Any]]
    train: Callable[[Mapping[str, Any], int], Checkpoint]
    published: Callable[[str], Checkpoint]
    published_config: Callable[[str], Mapping[str, Any]]


def network_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a plain config makes its network: its model, and its adapters if it has any."""
    return {name: config[name] for name in ("model", "adapters") if config.get(name)}


class Source:
    """Where parameters come from. A frozen dataclass; its fields are the keys of its config."""

    def read(self, reader: Reader) -> Checkpoint:
        """The checkpoint; may take as long as a training."""
        raise NotImplementedError

    def network(self, reader: Reader) -> Mapping[str, Any]:
        """`network_of` the config of what `read` will give, at once and without any array."""
        raise ConfigError(f"{reader.place} ({type(self).__name__}) has no model of its own; take another kind of source")
