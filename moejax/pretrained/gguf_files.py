"""GGUF: one file of tensors, often quantized, with the config and the tokenizer in its metadata (https://github.com/ggml-org/ggml).

Tensors come under the names and in the layout of the published safetensors, so that one table serves both, and as float32.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from moejax.core.errors import ConfigError, nearest
from moejax.pretrained.family import Family, families
from moejax.pretrained.store import Store
from moejax.pretrained.table import LAYER


class GGUFStore(Store):
    """The tensors of a GGUF file.

    Attributes:
      family: what its architecture is a file of.
      model_type: the name of that family.
      settings: its config, as a published config.json would say it.

    Raises:
      ConfigError: the package `gguf` is absent; the file is none, is cut off, or holds tensors that its family does not know.
    """

    def __init__(self, path: Path):
        self.place = str(path)
        reader = _open(path)
        meta = _meta(reader)
        architecture = meta.get("general.architecture", "")
        self.model_type, self.family = _family(architecture, self.place)
        own = {name.removeprefix(f"{architecture}."): value for name, value in meta.items()}
        self.settings = self.family.gguf_settings(own, [tensor.name for tensor in reader.tensors])
        names = [(_pattern(stored), key) for stored, key in self.family.gguf_names(self.settings).items()]
        self._tensors: dict[str, tuple[Any, Callable[[np.ndarray], np.ndarray]]] = {}
        for tensor in reader.tensors:
            key, change = _renamed(tensor.name, names)
            self._tensors[key] = tensor, change

    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(int(n) for n in reversed(self._tensors[key][0].shape))

    def where(self, key: str) -> str:
        return self.place

    def read(self, key: str) -> np.ndarray:
        from gguf.quants import dequantize

        tensor, change = self._tensors[key]
        return change(dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False).reshape(self.shape(key)))


def read_meta(path: Path) -> dict[str, Any]:
    """The metadata of a GGUF file. Raises ConfigError as `GGUFStore`."""
    return _meta(_open(path))


def _meta(reader: Any) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items()}


def _open(path: Path) -> Any:
    try:
        import gguf
    except ImportError:
        raise ConfigError(f"{path} needs the package `gguf`; `pip install 'moejax[pretrained]'`") from None

    class Reader(gguf.GGUFReader):
        def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
            for field in fields:
                _, name, _, dims, kind, offset = field.parts
                block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind[0])]
                end = int(start_offs + offset[0]) + math.prod(int(n) for n in dims) // block * size
                if end > len(self.data):
                    what = f"it has {len(self.data)} bytes, and the tensor ends at {end}"
                    raise ConfigError(f"{path} is cut off in tensor '{bytes(name).decode()}': {what}")
            super()._build_tensors(start_offs, fields)

    try:
        return Reader(path)
    except ConfigError:
        raise
    except Exception as error:  # the package fails in whatever way its next line does
        raise ConfigError(f"{path} is no GGUF file, or is cut off in its metadata ({error})") from None


def _family(architecture: str, place: str) -> tuple[str, Family]:
    known = {cls.gguf: (name, cls()) for name, cls in families.items() if cls.gguf}
    if architecture not in known:
        raise ConfigError(f"{place} is of architecture '{architecture}'{nearest(architecture, known)}")
    return known[architecture]


def _pattern(stored: str) -> re.Pattern[str]:
    return re.compile(re.escape(stored).replace(re.escape(LAYER), r"(?P<layer>\d+)"))


def _renamed(name: str, names: list[tuple[re.Pattern[str], Any]]) -> tuple[str, Callable[[np.ndarray], np.ndarray]]:
    """The published key of a stored tensor, and what makes it the published one; one that nobody knows keeps its name."""
    for pattern, key in names:
        match = pattern.fullmatch(name)
        if match:
            key, change = (key, _same) if isinstance(key, str) else key
            return key.replace(LAYER, match.groupdict().get("layer") or ""), change
    return name, _same


def _same(x: np.ndarray) -> np.ndarray:
    return x
