"""Where prepared data lies, how embedded data sets get there, and how any prepared data set is opened.

`$MOEJAX_DATA`, or `~/.cache/moejax`, holds one folder per embedded data set and state of the packages it comes from:

    embedded_text-py3.11.7-1f0c9a52/embedded_text/1.0.0/*.array_record*

Beside them lies `checksums.json`, the SHA-256 of every file. What is not what was written is moved aside and prepared anew.
"""

import contextlib
import functools
import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grain.sources import RandomAccessDataSource

from moejax.core.errors import ConfigError
from moejax.core.files import changed, digest, read_sealed, set_aside, write_sealed
from moejax.data.builders import sources
from moejax.data.catalog import DATASETS
from moejax.data.config import DataConfig

CHECKSUMS = "checksums.json"
# Where the features of standard data sets are written in TFDS. A prepared folder names classes by module; no other is imported.
_FEATURES = re.compile(
    r"tensorflow_datasets\.core\.features\.(audio|bounding_boxes|class_label|dataset|feature|features_dict|image|labeled_image|"
    r"optional|scalar|sequence|tensor|text|translation|video)(_feature)?\.\w+"
)


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

    Raises:
      ConfigError: the folder of prepared data cannot be used.
    """
    root = cache_dir() / f"{name}-{sources.fingerprint(name)}"
    try:
        return _prepare(name, root)
    except OSError as error:
        raise ConfigError(
            f"'{name}' in data.name cannot be prepared in {cache_dir()} ({error.strerror or error}); set MOEJAX_DATA to a folder that can "
            "be written, on a disk with room"
        ) from None


def _prepare(name: str, root: Path) -> Path:
    prepared = root / name / "1.0.0"
    if root.exists():
        damage = _damage(str(root), root.stat().st_mtime_ns)
        if damage is None:
            return prepared
        set_aside(root, "prepared data", damage, "prepared anew")
    import tensorflow_datasets as tfds

    from moejax.data.builders.embedded import BUILDERS

    cache_dir().mkdir(parents=True, exist_ok=True)
    own = Path(tempfile.mkdtemp(prefix=f".preparing-{name}-", dir=cache_dir()))
    try:
        tfds.disable_progress_bar()
        builder = BUILDERS[name](data_dir=own, file_format="array_record")
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS speaks of downloads, and there are none
            builder.download_and_prepare()
        files = (file for file in sorted(own.rglob("*")) if file.is_file())
        write_sealed(own / CHECKSUMS, {"files": {file.relative_to(own).as_posix(): digest(file) for file in files}})
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
    return open_folder(prepare(config.base) if DATASETS[config.base].embedded else _find(config))


def open_folder(folder: Any) -> Any:
    """The TFDS builder (read-only) of a data set's own folder, down to its version.

    Raises:
      ConfigError: its description cannot be read, or names a class that is none of TFDS's: reading it would import any module.
    """
    import tensorflow_datasets as tfds
    from etils import epath

    for name in ("dataset_info.json", "features.json"):
        file = epath.Path(folder) / name
        if not file.exists():
            continue
        try:
            named = set(_classes(json.loads(file.read_text())))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{file} cannot be read ({error}); prepare the data set anew") from None
        for strange in sorted(each for each in named if not _FEATURES.fullmatch(each)):
            raise ConfigError(
                f"{file} asks to import '{strange}', which is no feature of TFDS; prepare the data set from its source"
            )
    try:
        return tfds.builder_from_directory(folder)
    except Exception as error:  # TFDS and protobuf raise errors of many kinds
        raise ConfigError(
            f"{folder} is no data set that TFDS can read ({' '.join(str(error).split())}); prepare it anew"
        ) from error


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


def _classes(value: Any) -> Iterator[str]:
    """The names of classes in a description: TFDS imports what stands at these keys, also inside JSON that is kept as a string."""
    if isinstance(value, list):
        for item in value:
            yield from _classes(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key in ("pythonClassName", "python_class_name") or (key == "type" and isinstance(item, str) and "." in item):
                yield str(item)
            elif key == "json" and isinstance(item, str):
                yield from _classes(json.loads(item))
            else:
                yield from _classes(item)


@functools.lru_cache(maxsize=16)
def _damage(root: str, changed_at: int) -> str | None:
    """What is wrong with an embedded data set's files; read once in a process, and again when the folder is another."""
    try:
        return changed(Path(root), read_sealed(Path(root) / CHECKSUMS)["files"])
    except FileNotFoundError:
        return f"{CHECKSUMS} is missing"
    except ValueError as error:
        return f"{CHECKSUMS}: {error}"


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
    try:
        found = list(folder.glob("*/dataset_info.json"))
    except OSError as error:
        raise ConfigError(f"data.data_dir={data_dir} cannot be read ({error.strerror or error}); give a folder") from None
    for info in found:
        number = info.parent.name
        if version in ("", number) and re.fullmatch(r"[0-9]+(\.[0-9]+)*", number):
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
