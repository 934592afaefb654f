"""Where prepared data lies, how embedded data sets and one's own files get there, and how any prepared data set is opened.

`$MOEJAX_DATA`, or `~/.cache/moejax`, holds one folder per embedded data set and state of the packages it comes from, and one per
state of one's own files:

    embedded_text-py3.11.7-1f0c9a52/embedded_text/1.0.0/*.array_record*
    text_files-3b1e0d4f8c2a9677/text_files/1.0.0/*.array_record*

Beside them lies `checksums.json`, the SHA-256 of every file. What is not what was written is moved aside and prepared anew.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from grain.sources import RandomAccessDataSource

from moejax.core.errors import ConfigError
from moejax.core.files import changed, digest, read_sealed, set_aside, write_sealed
from moejax.data.builders import files, sources
from moejax.data.catalog import DATASETS, ImageDataset, TextDataset, held_out
from moejax.data.config import DataConfig, ImageConfig, TextConfig

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
    """Folder of prepared data: `$MOEJAX_DATA`, or `~/.cache/moejax`."""
    return Path(os.environ.get("MOEJAX_DATA") or "~/.cache/moejax").expanduser()


def prepare(name: str) -> Path:
    """The TFDS folder of an embedded data set; prepared first if these packages' state has not been prepared yet.

    Two processes may prepare at once: each writes a folder of its own and renames it into place, which is atomic; the one
    that comes second discards its copy. A process that dies leaves no half-written data set.

    Raises:
      ConfigError: the folder of prepared data cannot be used.
    """

    def make(**settings: Any) -> Any:
        from moejax.data.builders.embedded import BUILDERS

        return BUILDERS[name](**settings)

    return _prepared(name, sources.fingerprint(name), make)


def prepare_files(config: TextConfig | ImageConfig) -> Path:
    """As `prepare`, of the files at `data.path`: prepared anew whenever one of them has changed, come or gone.

    Raises:
      ConfigError: they cannot be used, and why.
    """
    found, fingerprint = _of_files(config)

    def make(**settings: Any) -> Any:
        from moejax.data.builders.own import ImageFiles, TextFiles

        if isinstance(config, TextConfig):
            return TextFiles(found, config.column, **settings)
        return ImageFiles(found, config.image_size, **settings)

    return _prepared(config.base, fingerprint, make)


def contents(config: TextConfig | ImageConfig) -> str:
    """Names what is in data of one's own: runs on a path whose contents differ are different runs.

    Raises:
      ConfigError: there is nothing.
    """
    if DATASETS[config.base].own == "files":
        return _of_files(config)[1]
    folder = _own_folder(config)
    state = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        # Data files are known by their sizes: there may be terabytes.
        what = digest(Path(file)) if file.suffix == ".json" else file.stat().length
        state.update(f"{file.name} {what}\n".encode())
    return state.hexdigest()[:16]


def _of_files(config: TextConfig | ImageConfig) -> tuple[files.Found, str]:
    """The files at `data.path`, and what decides what is prepared from them."""
    is_text = isinstance(config, TextConfig)
    found = files.find(str(config.path), files.TEXT_ENDINGS if is_text else files.IMAGE_ENDINGS)
    return found, files.fingerprint(found, config.base, config.column if is_text else config.image_size)


def _own_folder(config: TextConfig | ImageConfig) -> Any:
    """The folder of a data set that TFDS prepared: `data.path`, or the newest version below it."""
    from etils import epath

    path = epath.Path(str(config.path)).expanduser()
    if (path / "dataset_info.json").exists():
        return path
    if folder := _newest(path):
        return folder
    raise ConfigError(
        f"data.path='{config.path}' holds no data set of TFDS (a folder with a dataset_info.json, such as my_data/1.0.0); prepare one with "
        "`tfds build --file_format=array_record`"
    )


def _prepared(name: str, fingerprint: str, make: Callable[..., Any]) -> Path:
    root = cache_dir() / f"{name}-{fingerprint}"
    try:
        return _prepare(name, root, make)
    except OSError as error:
        raise ConfigError(
            f"'{name}' in data.name cannot be prepared in {cache_dir()} ({error.strerror or error}); set MOEJAX_DATA to a folder that can "
            "be written, on a disk with room"
        ) from None


def _prepare(name: str, root: Path, make: Callable[..., Any]) -> Path:
    prepared = root / name / "1.0.0"
    if root.exists():
        damage = _damage(str(root), root.stat().st_mtime_ns)
        if damage is None:
            return prepared
        set_aside(root, "prepared data", damage, "prepared anew")
    import tensorflow_datasets as tfds

    cache_dir().mkdir(parents=True, exist_ok=True)
    own = Path(tempfile.mkdtemp(prefix=f".preparing-{name}-", dir=cache_dir()))
    try:
        tfds.disable_progress_bar()
        builder = make(data_dir=own, file_format="array_record")
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS speaks of downloads, and there are none
            builder.download_and_prepare()
        written = (file for file in sorted(own.rglob("*")) if file.is_file())
        write_sealed(own / CHECKSUMS, {"files": {file.relative_to(own).as_posix(): digest(file) for file in written}})
        own.chmod(0o755)
        try:
            own.rename(root)
        except OSError:
            if not prepared.exists():
                raise
    finally:
        shutil.rmtree(own, ignore_errors=True)
    return prepared


def open_dataset(config: TextConfig | ImageConfig) -> tuple[Any, TextDataset | ImageDataset]:
    """The builder of `open_builder`, and the data set as it is there: its splits, and where its text is.

    Raises:
      ConfigError: data of one's own lack what they need.
    """
    builder, dataset = open_builder(config), DATASETS[config.base]
    if not dataset.own:
        return builder, dataset
    there = set(builder.info.splits)
    if "train" not in there:
        raise ConfigError(f"data.path='{config.path}' has no split 'train', but {', '.join(sorted(there)) or 'none'}")
    splits = {split: split for split in files.SPLITS if split in there}
    if "validation" not in there:
        splits = held_out(2, **{name: name for name in ("test",) if name in there})
    changes: dict[str, Any] = {"splits": splits}
    if dataset.own == "tfds":
        needed = (config.column,) if isinstance(config, TextConfig) else (dataset.image, dataset.label)
        if missing := [name for name in needed if name not in builder.info.features]:
            fix = "; say where the text is with data.column" if isinstance(config, TextConfig) else ""
            raise ConfigError(
                f"data.path='{config.path}' has no feature '{missing[0]}', but {', '.join(sorted(builder.info.features))}{fix}"
            )
        changes |= {"text": config.column} if isinstance(config, TextConfig) else {}
    return builder, dataclasses.replace(dataset, **changes)


def open_builder(config: TextConfig | ImageConfig) -> Any:
    """The TFDS builder (read-only) of a prepared data set; embedded ones, and one's own files, are prepared on the way.

    Raises:
      ConfigError: a standard corpus that lies in no data folder; says how to prepare it.
    """
    dataset = DATASETS[config.base]
    if dataset.own:
        return open_folder(prepare_files(config) if dataset.own == "files" else _own_folder(config))
    return open_folder(prepare(config.base) if dataset.embedded else _find(config))


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
    try:
        newest = _newest(folder, version)
    except OSError as error:
        raise ConfigError(f"data.data_dir={data_dir} cannot be read ({error.strerror or error}); give a folder") from None
    if newest is None:
        full = f"{base}/{variant}" if variant else base
        raise ConfigError(
            f"'{config.name}' in data.name is not prepared in {data_dir} (data.data_dir); prepare it with "
            f"`tfds build {full} --file_format=array_record --data_dir={data_dir}`, point data.data_dir at a folder that has "
            "it, or take one that needs no preparation: "
            + ", ".join(n for n, d in DATASETS.items() if d.embedded and type(d) is type(DATASETS[base]))
        )
    return newest


def _newest(folder: Any, version: str = "") -> Any:
    """Folder of the newest version (or of `version`) of a data set that is prepared in `folder`; None if there is none."""
    versions = []
    for info in folder.glob("*/dataset_info.json"):
        number = info.parent.name
        if version in ("", number) and re.fullmatch(r"[0-9]+(\.[0-9]+)*", number):
            versions.append((tuple(map(int, number.split("."))), info.parent))
    return max(versions)[1] if versions else None
