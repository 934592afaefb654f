"""Safetensors: a file, or a folder of shards with an index. Tensors are read one at a time, and nothing stays in memory but them.

The format is a length, a header in JSON and the bytes (https://huggingface.co/docs/safetensors). It is read and written here, without a
package: bfloat16 comes as ml_dtypes' type, and what is wrong with a file is said with the file's name and the tensor's.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from moejax.core.errors import ConfigError
from moejax.core.paths import listed
from moejax.pretrained.store import Store

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 2**32
_MOST_HEADER = 100_000_000  # bytes; what the format allows

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class _Entry(NamedTuple):
    """Where a tensor lies."""

    file: Path
    start: int
    dtype: np.dtype
    shape: tuple[int, ...]


class SafetensorsStore(Store):
    """The tensors of a safetensors file, or of all shards in a folder.

    Raises:
      ConfigError: a file that is no safetensors file, is cut off or contradicts itself; an index that names a file outside its folder, or
        a tensor that its file lacks. Names file and tensor.
    """

    def __init__(self, path: Path):
        self.place = str(path)
        self._entries: dict[str, _Entry] = {}
        if path.is_file():
            self._entries = _read_header(path)
        elif (path / INDEX).is_file():
            self._entries = _read_index(path)
        elif (path / SINGLE).is_file():
            self._entries = _read_header(path / SINGLE)
        else:
            pickled = [file.name for file in path.glob("*.bin")] + [file.name for file in path.glob("*.pt")]
            why = f"; {listed(pickled)} would have to be unpickled, which runs whatever code is in it" if pickled else ""
            raise ConfigError(f"{path} has neither {SINGLE} nor {INDEX}{why}")

    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._entries[key].shape

    def where(self, key: str) -> str:
        return str(self._entries[key].file)

    def read(self, key: str) -> np.ndarray:
        file, start, dtype, shape = self._entries[key]
        # Read and not mapped: pages of a mapping would count as this process's memory beside the arrays.
        return np.fromfile(file, dtype, math.prod(shape), offset=start).reshape(shape)


def write_safetensors(
    folder: Path,
    tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    read: Any,
    shard_bytes: int = SHARD_BYTES,
    name: str = SINGLE,
) -> None:
    """Writes tensors, in order, into one file or into shards of at most `shard_bytes` (or one tensor) with an index.

    Files appear whole or not at all, and of the tensors one at a time is in memory.

    Args:
      folder: where to; made if need be.
      tensors: key -> type and shape.
      read: `read(key)` gives the array.
      shard_bytes: of a file.
      name: of the file, where there is one; shards are numbered after it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, tuple[np.dtype, tuple[int, ...]]]] = [{}]
    filled = 0
    for key, (dtype, shape) in tensors.items():
        size = dtype.itemsize * math.prod(shape)
        if filled and filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][key] = (dtype, shape)
        filled += size
    stem = name.removesuffix(".safetensors")
    names = [f"{stem}-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))] if shards[1:] else [name]
    for file, shard in zip(names, shards, strict=True):
        _write_file(folder / file, shard, read)
    for stale in {file.name for file in folder.glob(f"{stem}*.safetensors")} - set(names):
        (folder / stale).unlink()
    if len(names) == 1:
        (folder / INDEX).unlink(missing_ok=True)
        return
    total = sum(dtype.itemsize * math.prod(shape) for dtype, shape in tensors.values())
    weight_map = {key: file for file, shard in zip(names, shards, strict=True) for key in shard}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n")


def _write_file(file: Path, tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]], read: Any) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for key, (dtype, shape) in tensors.items():
        if dtype not in _NAMES:
            raise ConfigError(f"'{key}' is {dtype}, which safetensors cannot hold; take float32, bfloat16 or float16")
        size = dtype.itemsize * math.prod(shape)
        header[key] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    with _written(part, file) as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for key, (dtype, shape) in tensors.items():
            value = np.ascontiguousarray(read(key), dtype)
            if value.shape != shape:
                raise AssertionError(f"{key} is {value.shape} and was announced as {shape}")
            stream.write(value.view(np.uint8).data if value.size else b"")


@contextlib.contextmanager
def _written(part: Path, file: Path) -> Iterator[Any]:
    try:
        with part.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def _read_index(folder: Path) -> dict[str, _Entry]:
    """The tensors that an index names, each in the file that it says."""
    place = folder / INDEX
    try:
        named = json.loads(place.read_text())["weight_map"]
        pairs = {str(key): str(file) for key, file in named.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{place} is no index: it needs a 'weight_map' of tensors to files") from None
    files: dict[str, dict[str, _Entry]] = {}
    found = {}
    for key, name in pairs.items():
        if name != os.path.basename(name) or name in ("", ".", ".."):
            raise ConfigError(f"{place} says that '{key}' lies in '{name}', outside its folder")
        if name not in files:
            if not (folder / name).is_file():
                raise ConfigError(f"{place} says that '{key}' lies in '{name}', which is not there")
            files[name] = _read_header(folder / name)
        if key not in files[name]:
            raise ConfigError(f"{place} says that '{key}' lies in '{name}', which has no such tensor")
        found[key] = files[name][key]
    for name, entries in files.items():
        extra = [key for key in entries if pairs.get(key) != name]
        if extra:
            raise ConfigError(f"{folder / name} has tensors that {INDEX} does not name there: {listed(extra)}")
    return found


def _read_header(file: Path) -> dict[str, _Entry]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _MOST_HEADER):
            raise ConfigError(f"{file} is no safetensors file, or is cut off in its header")
        text = stream.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        entries = {key: _entry(file, key, said, 8 + length) for key, said in header.items()}
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{file} is no safetensors file: its header cannot be read ({error})") from None
    end = 8 + length
    for key, entry in sorted(entries.items(), key=lambda item: item[1].start):
        if entry.start != end:
            raise ConfigError(f"{file}: tensor '{key}' begins at byte {entry.start}, where the one before ends at {end}")
        end += entry.dtype.itemsize * math.prod(entry.shape)
        if end > size:
            raise ConfigError(f"{file} is cut off in tensor '{key}': it has {size} bytes, and the tensor ends at {end}")
    if end != size:
        raise ConfigError(f"{file} has {size} bytes, and its tensors end at {end}")
    return entries


def _entry(file: Path, key: str, said: Mapping[str, Any], begin: int) -> _Entry:
    dtype, shape, (start, stop) = said["dtype"], tuple(said["shape"]), said["data_offsets"]
    if dtype not in DTYPES:
        raise ConfigError(f"{file}: tensor '{key}' is of type '{dtype}'; known are {', '.join(DTYPES)}")
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, start, stop)):
        raise ConfigError(f"{file}: tensor '{key}' has shape {list(shape)} and bytes {start} to {stop}")
    if stop - start != DTYPES[dtype].itemsize * math.prod(shape):
        raise ConfigError(f"{file}: tensor '{key}' has {stop - start} bytes, which is not {dtype}{list(shape)}")
    return _Entry(file, begin + start, DTYPES[dtype], shape)
