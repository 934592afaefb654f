"""Files that are whole or absent, that say whether they are what was written, and folders that one process has for itself.

What cannot be trusted is never used and never deleted: it is renamed to `<name>.corrupt`, named in a warning of one line
(`Damaged`), and made again.
"""

import contextlib
import errno
import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moejax.core.errors import ConfigError

SEAL = "sha256"
# What the system says of a folder that may be read only, and of a file system that knows no locks.
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


class Damaged(UserWarning):
    """Something on disk is not what was written, and is not used."""


def write_atomically(path: Path, text: str) -> None:
    """Writes a file that is either the old one or the new one, never half; makes its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("w") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def write_json(path: Path, data: Any, indent: int | None = None) -> None:
    """Writes a value as JSON, atomically."""
    write_atomically(path, json.dumps(data, indent=indent) + "\n")


def write_sealed(path: Path, data: Mapping[str, Any], indent: int | None = None) -> None:
    """Writes a mapping as JSON, with a checksum of itself as its last entry; `read_sealed` reads it."""
    write_json(path, seal(data), indent)


def read_sealed(path: Path) -> dict[str, Any]:
    """The mapping in a file of `write_sealed`.

    Raises:
      ValueError: a character of it has changed, or it has no checksum. Says what is wrong, without the file's name.
      FileNotFoundError: there is none.
    """
    try:
        found = json.loads(path.read_text())
    except ValueError:
        raise ValueError("it is not readable") from None
    return unseal(found)


def seal(data: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping with a checksum of what it reads back as."""
    return {**data, SEAL: _hash(data)}


def unseal(data: Any) -> dict[str, Any]:
    """The mapping without its checksum.

    Raises:
      ValueError: the checksum is another one, or there is none.
    """
    if not isinstance(data, dict) or SEAL not in data:
        raise ValueError("it has no checksum")
    rest = {name: value for name, value in data.items() if name != SEAL}
    if _hash(rest) != data[SEAL]:
        raise ValueError("it is not what was written")
    return rest


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON-lines file that can be read; others, such as a last one that was cut off, are left out with a word."""
    return parse_lines(path.read_text(errors="replace"), str(path))


def parse_lines(text: str, name: str) -> list[dict[str, Any]]:
    """As `read_lines`, of a text called `name`."""
    found, lost = [], 0
    for line in text.split("\n"):
        try:
            value = json.loads(line or "{}")
        except ValueError:
            value = None
        if not isinstance(value, dict):
            lost += 1
        elif value:
            found.append(value)
    if lost:
        warnings.warn(f"{lost} line{'' if lost == 1 else 's'} of {name} cannot be read: left out", Damaged, stacklevel=3)
    return found


def digest(file: Path) -> str:
    """The SHA-256 of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def changed(folder: Path, digests: Mapping[str, str]) -> str | None:
    """What is wrong with files of a folder, given the `digest` of each by relative path; None if nothing is."""
    for name, expected in digests.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if digest(file) != expected:
            return f"{name} is not what was written"
    return None


def set_aside(path: Path, what: str, damage: str, then: str = "") -> Path | None:
    """Renames a damaged file or folder to `<name>.corrupt` and says so; None if another process was quicker.

    Args:
      what: its kind, the first word of the warning.
      damage: what is wrong with it.
      then: what becomes of it.
    """
    aside = free_name(path)
    try:
        path.rename(aside)
    except FileNotFoundError:
        return None
    warnings.warn(f"{what} {path} is damaged ({damage}); moved to {aside}{then and f', {then}'}", Damaged, stacklevel=2)
    return aside


def free_name(path: Path) -> Path:
    """`<name>.corrupt`, or `<name>.corrupt-2` and so on where that is taken."""
    names = (path.with_name(f"{path.name}.corrupt{suffix}") for suffix in ("", *(f"-{n}" for n in range(2, 1000))))
    return next(name for name in names if not os.path.lexists(name))


@contextlib.contextmanager
def locked(file: Path, busy: str) -> Iterator[None]:
    """Holds a lock that ends with the process, whatever ends it.

    Where nothing can be written, or the file system knows no locks, there is none.

    Args:
      file: the lock; stays, empty.
      busy: the error if another process of this machine, or another call in this one, holds it.

    Raises:
      ConfigError: `busy`.
    """
    try:
        import fcntl

        file.parent.mkdir(parents=True, exist_ok=True)
        stream = file.open("a")
    except (ImportError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _READ_ONLY:
            raise
        yield
        return
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(busy) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield


def _hash(data: Mapping[str, Any]) -> str:
    """Of the values, and neither of the order of keys nor of spaces."""
    plain = json.loads(json.dumps(data))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
