"""Where prepared data lies, how embedded data sets get there, and how any prepared data set is opened.

`$MOEJAX_DATA`, or `~/.cache/moejax`, holds one folder per embedded data set and state of the packages it comes from:

    embedded_text-py3.11.7-1f0c9a52/embedded_text/1.0.0/*.array_record*
"""

import contextlib
import io
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from grain.sources import RandomAccessDataSource

from moejax.core.errors import ConfigError
from moejax.data.builders import sources
from moejax.data.catalog import DATASETS
from moejax.data.config import DataConfig


class Held:
    """Examples that are decoded once and then kept. Reading and parsing a small image again takes longer than using it."""

    def __init__(self, examples: RandomAccessDataSource):
        self._examples = examples
        self._held: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index not in self._held:
            self._held[index] = self._examples[index]
        return self._held[index]


def cache_dir() -> Path:
    """Folder of prepared embedded data: `$MOEJAX_DATA`, or `~/.cache/moejax`."""
    return Path(os.environ.get("MOEJAX_DATA") or "~/.cache/moejax").expanduser()


def prepare(name: str) -> Path:
    """The TFDS folder of an embedded data set; prepared first if these packages' state has not been prepared yet.

    Two processes may prepare at once: each writes a folder of its own and renames it into place, which is atomic; the one
    that comes second discards its copy. A process that dies leaves no half-written data set.
    """
    root = cache_dir() / f"{name}-{sources.fingerprint(name)}"
    prepared = root / name / "1.0.0"
    if prepared.exists():
        return prepared
    import tensorflow_datasets as tfds

    from moejax.data.builders.embedded import BUILDERS

    cache_dir().mkdir(parents=True, exist_ok=True)
    own = Path(tempfile.mkdtemp(prefix=f".preparing-{name}-", dir=cache_dir()))
    try:
        tfds.disable_progress_bar()
        builder = BUILDERS[name](data_dir=own, file_format="array_record")
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS speaks of downloads, and there are none
            builder.download_and_prepare()
        own.chmod(0o755)
        try:
            own.rename(root)
        except OSError:
            if not prepared.exists():
                raise
    finally:
        shutil.rmtree(own, ignore_errors=True)
    return prepared


def open_builder(config: DataConfig) -> Any:
    """The TFDS builder (read-only) of a prepared data set; embedded ones are prepared on the way.

    Raises:
      ConfigError: a standard corpus that lies in no data folder; says how to prepare it.
    """
    import tensorflow_datasets as tfds

    if DATASETS[config.base].embedded:
        return tfds.builder_from_directory(prepare(config.base))
    return tfds.builder_from_directory(_find(config))


def fits_in_memory(builder: Any) -> bool:
    """Whether the whole data set takes at most 256 MB on disk."""
    return (builder.info.dataset_size or 0) <= 256 * 2**20


def open_split(builder: Any, split: str, name: str) -> RandomAccessDataSource:
    """The examples of a TFDS split expression such as `train[:98%]`.

    Raises:
      ConfigError: prepared in a format without random access.
    """
    try:
        return builder.as_data_source(split)
    except NotImplementedError:
        raise ConfigError(
            f"'{name}' in data.name is prepared as {builder.info.file_format.value}, which has no random access; convert it "
            f"with `tfds convert_format --dataset_version_dir={builder.data_dir} --out_file_format=array_record`"
        ) from None


def _find(config: DataConfig) -> Any:
    """Folder of the newest (or the named) prepared version of a standard corpus; local or on a bucket (`gs://...`)."""
    from etils import epath
    from tensorflow_datasets.core import constants

    name, _, version = config.name.partition(":")
    base, _, variant = name.partition("/")
    variant = variant or DATASETS[base].version
    data_dir = epath.Path(config.data_dir or os.environ.get("TFDS_DATA_DIR") or constants.DATA_DIR).expanduser()
    folder = data_dir / base / variant if variant else data_dir / base
    versions = []
    for info in folder.glob("*/dataset_info.json"):
        number = info.parent.name
        if version in ("", number) and all(part.isdigit() for part in number.split(".")):
            versions.append((tuple(map(int, number.split("."))), info.parent))
    if not versions:
        full = f"{base}/{variant}" if variant else base
        raise ConfigError(
            f"'{config.name}' in data.name is not prepared in {data_dir} (data.data_dir); prepare it with "
            f"`tfds build {full} --file_format=array_record --data_dir={data_dir}`, point data.data_dir at a folder that has "
            "it, or take one that needs no preparation: "
            + ", ".join(n for n, d in DATASETS.items() if d.embedded and type(d) is type(DATASETS[base]))
        )
    return max(versions)[1]
