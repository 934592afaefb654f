"""Documents and images from files of one's own: which files are read, how they are divided into splits, and what is in them.

Text (`.txt`, and records of `.jsonl`, `.parquet` and `.arrow`) and images (`<class>/<name>.png`, also `.jpg`, `.webp`, ...) are found in a
folder, at any depth, or by a pattern (`/data/*.txt`). The division is a rule that gives the same splits on every machine:

- Where the folder has sub-folders `train`, `validation` and `test`, they are the splits. One without `validation` holds out a part of `train`.
- Elsewhere documents (images) are ordered by the hash of their contents. The first 5 % of the bytes (10 % of the images) are the
  test split, the next 5 % (10 %) are validation, the rest trains.

Equal documents are kept once, in the test split before validation before train. A document longer than a twentieth of all the bytes,
or than 1 MiB, is cut into several at the ends of lines: one file may be the whole corpus.
"""

import contextlib
import functools
import glob
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from moejax.core.errors import ConfigError
from moejax.core.files import digest
from moejax.data.builders.sources import split_by_share

SPLITS = ("train", "validation", "test")
TEXT_ENDINGS = (".txt", ".jsonl", ".parquet", ".arrow")
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
HELD_OUT = {"text": 0.05, "image": 0.1}

_RECIPE = 1  # raise it when the rules above change, so that what older rules prepared is left alone
_LONGEST, _SHORTEST = 2**20, 2**10  # bytes of a document: where longer ones are cut, and where none is
_GREY = ("1", "L", "LA")
_COLOURED = ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "RGBa", "La")
_TURNED = (5, 6, 7, 8)  # orientations of a photograph that lies on its side


@dataclass(frozen=True)
class Found:
    """The files at a path, in the order of their names below `root`; `by_folder` if sub-folders are the splits."""

    path: str
    root: Path
    files: tuple[Path, ...]

    @property
    def by_folder(self) -> bool:
        return any(self.parts(file)[0] in SPLITS for file in self.files if len(self.parts(file)) > 1)

    def name(self, file: Path) -> str:
        return file.relative_to(self.root).as_posix()

    def parts(self, file: Path) -> tuple[str, ...]:
        return file.relative_to(self.root).parts

    def split(self, file: Path) -> str:
        """The split that a file's folder names.

        Raises:
          ConfigError: it lies in none of them.
        """
        if self.parts(file)[0] not in SPLITS:
            raise ConfigError(
                f"{file} lies beside the folders {', '.join(s for s in SPLITS if (self.root / s).is_dir())} of data.path='{self.path}', "
                "and so in no split; move it into one of them"
            )
        return self.parts(file)[0]


def find(path: str, endings: tuple[str, ...]) -> Found:
    """The files that `data.path` names: a folder, a pattern or one file. Of a folder, those with one of the `endings`.

    Raises:
      ConfigError: there are none.
    """
    place = Path(path).expanduser()
    if glob.has_magic(str(place)):
        plain = itertools.takewhile(lambda part: not glob.has_magic(part), place.parts)
        root = Path(*plain)
        files = [Path(each) for each in glob.glob(str(place), recursive=True) if Path(each).is_file()]
    elif place.is_dir():
        root = place
        # Beside its data, `datasets` leaves what it has computed of them.
        files = [f for f in place.rglob("*") if f.suffix.lower() in endings and f.is_file() and not f.name.startswith("cache-")]
        files = [f for f in files if not any(part.startswith(".") for part in f.relative_to(root).parts)]
    elif place.is_file():
        root, files = place.parent, [place]
    else:
        raise ConfigError(f"data.path='{path}' is not there; give a folder, a pattern such as '/data/*{endings[0]}', or a file")
    if not files:
        raise ConfigError(f"data.path='{path}' holds no files that end in {', '.join(endings)}")
    return Found(path, root, tuple(sorted(files, key=lambda file: file.relative_to(root).as_posix())))


def fingerprint(found: Found, *settings: Any) -> str:
    """A short name of everything that decides what is prepared from files: their names, their contents, and the settings."""
    state = hashlib.sha256(f"{_RECIPE} {settings}".encode())
    for file in found.files:
        state.update(f"{found.name(file)} {_digest_of(file)}\n".encode())
    return state.hexdigest()[:16]


def documents(found: Found, column: str) -> Iterator[tuple[Path, bytes]]:
    """Every document, and the file that it is from; those that are too long are cut, and empty ones left out.

    Raises:
      ConfigError: a file that is no UTF-8, or has no text where it should.
    """
    limit = min(max(sum(file.stat().st_size for file in found.files) // 20, _SHORTEST), _LONGEST)
    for file in found.files:
        try:
            for text in _READERS.get(file.suffix.lower(), _whole)(file, column):
                yield from ((file, piece) for piece in _cut(text, limit) if piece.strip())
        except OSError as error:
            raise ConfigError(
                f"{file} cannot be read ({error.strerror or error}); mend it, or leave it out of data.path"
            ) from None


def text_splits(found: Found, column: str) -> dict[str, str]:
    """Hash of each document -> its split.

    Raises:
      ConfigError: too few documents to train on some and to evaluate on others.
    """
    sizes: dict[str, dict[str, int]] = {split: {} for split in SPLITS}
    for file, text in documents(found, column):
        sizes[found.split(file) if found.by_folder else "train"][name_of(text)] = len(text)
    own, share = sizes["train"], HELD_OUT["text"]
    ordered = sorted(own)
    if not found.by_folder:
        splits = split_by_share(ordered, [own[name] for name in ordered], share)
    else:
        splits = {split: list(sizes[split]) for split in SPLITS}
        if not splits["validation"]:
            splits |= _held_out(ordered, [own[name] for name in ordered], share)
    division = {name: split for split in SPLITS for name in splits[split]}  # the last one wins
    _check_division(found, division.values(), "documents")
    return division


def image_splits(found: Found) -> dict[Path, str]:
    """Each image -> its split.

    Raises:
      ConfigError: too few images to train on some and to evaluate on others.
    """
    if found.by_folder:
        division = {file: found.split(file) for file in found.files}
    else:
        division = dict.fromkeys(found.files, "train")
    if not found.by_folder or "validation" not in division.values():
        own = sorted((f for f in found.files if division[f] == "train"), key=lambda f: (_digest_of(f), found.name(f)))
        cut = _held_out if found.by_folder else split_by_share
        division |= {f: split for split, part in cut(own, [1] * len(own), HELD_OUT["image"]).items() for f in part}
    _check_division(found, division.values(), "images")
    return division


def classes(found: Found) -> dict[Path, str]:
    """Each image -> its class, the name of its folder below that of its split.

    Raises:
      ConfigError: one that lies in no such folder, or a single class.
    """
    level = 1 if found.by_folder else 0
    names = {}
    for file in found.files:
        parts = found.parts(file)
        if len(parts) < level + 2:
            raise ConfigError(
                f"{file} lies in no class's folder; put the images of data.path='{found.path}' into a folder for each class, "
                f"such as {'train/' * level}cats/{file.name}"
            )
        names[file] = parts[level]
    if len(set(names.values())) < 2:
        raise ConfigError(
            f"data.path='{found.path}' has one class only, '{next(iter(names.values()))}'; a classifier needs a folder for each of "
            "two classes or more"
        )
    return names


def image_format(found: Found, size: int | None) -> tuple[int, int, int]:
    """Height, width and channels of the prepared images: 1 channel if all are grey, else 3. Reads no more than the files' heads.

    Raises:
      ConfigError: sizes differ and `size` (`data.image_size`) is unset, or a file is no image of 8 bits a channel.
    """
    shapes: dict[tuple[int, int], Path] = {}
    channels = 1
    for file in found.files:
        with _opened(file) as image:
            if image.mode not in (*_GREY, *_COLOURED):
                raise ConfigError(f"{file} is an image of mode '{image.mode}'; convert it to 8 bits a channel, or leave it out")
            channels = channels if image.mode in _GREY else 3
            width, height = image.size[:: -1 if image.getexif().get(0x0112) in _TURNED else 1]
            shapes.setdefault((height, width), file)
    if size is not None:
        return size, size, channels
    if len(shapes) > 1:
        (one, first), (other, second) = list(shapes.items())[:2]
        raise ConfigError(
            f"the images of data.path='{found.path}' differ in size ({first} is {one[0]} x {one[1]}, {second} {other[0]} x {other[1]}); "
            "set data.image_size, to 64 for example"
        )
    return *next(iter(shapes)), channels


def pixels(file: Path, channels: int) -> UInt8[np.ndarray, "h w c"]:
    """One image, upright.

    Raises:
      ConfigError: it cannot be decoded.
    """
    from PIL import ImageOps

    with _opened(file) as image:
        upright = ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB")
    return np.asarray(upright, np.uint8).reshape(*upright.size[::-1], channels)


def name_of(text: bytes) -> str:
    """The hash of a document, which decides order and split."""
    return hashlib.sha256(text).hexdigest()


def _held_out(items: list[Any], sizes: list[int], share: float) -> dict[str, list[Any]]:
    """`train` and `validation`, of items in the order of their hashes."""
    splits = split_by_share(items, sizes, share)
    return {"train": splits["train"] + splits["validation"], "validation": splits["test"]}


def _check_division(found: Found, splits: Any, what: str) -> None:
    splits = list(splits)
    for split in SPLITS[:2]:
        if split not in splits:
            raise ConfigError(
                f"data.path='{found.path}' holds {len(splits)} {what} and so none for the split '{split}'; at least 3 are needed, or "
                "sub-folders train and validation"
            )


@functools.lru_cache(maxsize=2**20)
def _digest(file: str, size: int, changed_at: int) -> str:
    return digest(Path(file))


def _digest_of(file: Path) -> str:
    """The SHA-256 of a file; read again where its size or its time has changed."""
    stat = file.stat()
    return _digest(str(file.absolute()), stat.st_size, stat.st_mtime_ns)


def _cut(text: bytes, limit: int) -> Iterator[bytes]:
    """The text, in pieces of whole lines where it is longer than `limit`."""
    if len(text) <= limit:
        yield text
        return
    piece: list[bytes] = []
    size = 0
    for line in text.splitlines(keepends=True):
        if size and size + len(line) > limit:
            yield b"".join(piece)
            piece, size = [], 0
        piece.append(line)
        size += len(line)
    yield b"".join(piece)


def _whole(file: Path, column: str) -> Iterator[bytes]:
    text = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        text.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{file} is no UTF-8 text (byte {error.start:,} is 0x{text[error.start]:02x}); convert it "
            f"(`iconv -f latin1 -t utf-8`), or leave it out of data.path"
        ) from None
    yield text


def _json_lines(file: Path, column: str) -> Iterator[bytes]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:  # an error of UTF-8 is one
                raise ConfigError(f"line {number:,} of {file} is no JSON in UTF-8 ({error})") from None
            yield _text_in(record if isinstance(record, dict) else {}, column, f"line {number:,} of {file}")


def _tables(file: Path, column: str) -> Iterator[bytes]:
    """Records of a Parquet file, or of an Arrow file as `datasets` saves it (a stream) and as Arrow itself does."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(
            f"{file} needs the package `pyarrow`; `pip install pyarrow`, or export the data as .jsonl (`dataset.to_json(path)`)"
        ) from None

    def read(batches: Any) -> Iterator[bytes]:
        for number, batch in enumerate(batches, 1):
            place = f"batch {number:,} of {file}"
            if column not in batch.schema.names:
                _text_in(dict.fromkeys(batch.schema.names), column, place)
            for value in batch.column(column).to_pylist():
                yield _text_in({column: value}, column, place)

    try:
        with pyarrow.memory_map(str(file)) as source:
            if file.suffix.lower() == ".parquet":
                yield from read(pyarrow.parquet.ParquetFile(source).iter_batches())
                return
            try:
                stream = pyarrow.ipc.open_stream(source)
            except pyarrow.ArrowInvalid:
                source.seek(0)
                whole = pyarrow.ipc.open_file(source)
                yield from read(whole.get_batch(i) for i in range(whole.num_record_batches))
            else:
                yield from read(stream)
    except pyarrow.ArrowException as error:
        raise ConfigError(f"{file} cannot be read as {file.suffix[1:]}: {' '.join(str(error).split())}") from None


_READERS: dict[str, Callable[[Path, str], Iterator[bytes]]] = {
    ".jsonl": _json_lines,
    ".parquet": _tables,
    ".arrow": _tables,
}


def _text_in(record: dict[str, Any], column: str, place: str) -> bytes:
    if column not in record:
        raise ConfigError(
            f"{place} has no '{column}', but {', '.join(record) or 'nothing'}; say where the text is with data.column"
        )
    if not isinstance(record[column], str):
        raise ConfigError(
            f"'{column}' in {place} is no text but {type(record[column]).__name__}; say where the text is with data.column"
        )
    return record[column].encode(errors="replace")


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """An image of Pillow's; whatever is wrong with it, its file is named."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            yield image
    except (OSError, ValueError, SyntaxError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{file} cannot be read as an image ({error}); mend it, or leave it out of data.path") from None
