"""Opening a published model: its config is read, and its tensors wait."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from moejax.core.errors import ConfigError, nearest
from moejax.pretrained.family import Family, Settings, families
from moejax.pretrained.gguf_files import GGUFStore
from moejax.pretrained.names import find
from moejax.pretrained.safetensors_files import SafetensorsStore
from moejax.pretrained.store import Store

CONFIG = "config.json"


class Opened(NamedTuple):
    """A published model whose config is read and whose tensors wait.

    Attributes:
      model_type: the name of its family.
      family: what knows its tensors.
      settings: its config.
      store: its tensors.
      path: where it lies.
    """

    model_type: str
    family: Family
    settings: Settings
    store: Store
    path: Path


def open_model(name: str) -> Opened:
    """A model by name or path: a GGUF file, or a folder with config.json and safetensors.

    Raises:
      ConfigError: no such model, a family that the library does not know, or damaged files.
    """
    path = find(name)
    if path.is_file() and path.suffix == ".gguf":
        store = GGUFStore(path)
        return Opened(store.model_type, store.family, Settings(store.settings, str(path)), store, path)
    folder = path if path.is_dir() else path.parent
    values = read_config(folder)
    model_type = str(values.get("model_type"))
    if model_type not in families.kinds():
        raise ConfigError(f"{folder / CONFIG} has model_type='{model_type}'{nearest(model_type, families.kinds())}")
    return Opened(model_type, families[model_type](), Settings(values, str(folder / CONFIG)), SafetensorsStore(path), path)


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a folder.

    Raises:
      ConfigError: it is not there, or is no mapping.
    """
    place = folder / CONFIG
    try:
        values = json.loads(place.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{folder} has no {CONFIG}") from None
    except ValueError as error:
        raise ConfigError(f"{place} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{place} is no mapping of names to values")
    return values
