"""A published model."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from moejax.surgery.base import Checkpoint
from moejax.surgery.sources.base import Reader, Source, network_of, sources


@sources.register("pretrained")
@dataclasses.dataclass(frozen=True)
class PretrainedSource(Source):
    """A published model: of Hugging Face's safetensors, or of a GGUF file. Its `config.model` is `moejax.pretrained.config_of(path)`.

    Attributes:
      path: a name of `moejax.pretrained.names.MODELS` such as 'smollm2-135m', a folder with config.json and safetensors, or a GGUF file.
    """

    path: str

    def read(self, reader: Reader) -> Checkpoint:
        """See the class."""
        return reader.published(self.path)

    def network(self, reader: Reader) -> Mapping[str, Any]:
        """Of the published config; no tensor is read."""
        return network_of(reader.published_config(self.path))
