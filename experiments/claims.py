"""Who trains what, where several processes share a folder of runs: claims that end when their holder does.

A claim is a file that one process made, and nobody else could (`open` in mode 'x'). Its holder renews it while it works. Of a holder on
this machine the system knows whether it lives; of any other it is taken for gone when it has not renewed its claim for the length of its
lease. That is measured on one clock, the file system's: machines need not agree on the time, and locks of the file system are not
needed.

Nobody takes a claim away. Who finds one whose holder is gone makes its successor, `<name>.<token of the claim>`: tokens are unique, so
of several who try one succeeds, and who comes too late cannot hurt a newer claim. The last of the chain counts.
"""

import contextlib
import json
import os
import platform
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moejax.core.errors import ConfigError

LEASE = 60.0  # seconds; $MOEJAX_LEASE
RENEWALS = 6  # in a lease
POLL = 1.0  # seconds between two looks at a claim of somebody else


class Busy(ConfigError):
    """Another process has the claim."""


@contextlib.contextmanager
def claimed(file: Path, busy: str, wait: Callable[[], None] | None = None) -> Iterator[Callable[[], None]]:
    """Holds the claim `file`, and renews it meanwhile.

    Args:
      file: the claim; gone when nobody holds it.
      busy: the error if another process, or another call in this one, holds it.
      wait: called again and again while it does, instead of the error.

    Yields:
      A function that raises `Busy` if the claim was lost: this process slept for longer than the lease, and another one took over.

    Raises:
      Busy: it is held.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    while (mine := _take(file)) is None:
        if wait is None:
            raise Busy(busy)
        wait()
        time.sleep(POLL)
    released, lost = threading.Event(), threading.Event()

    def renew() -> None:
        while not released.wait(mine.lease / RENEWALS):
            # The server may be away for a moment; if it is for long, others will say that the claim is theirs.
            with contextlib.suppress(OSError):
                os.utime(mine.file)
                if _newest(file) != mine:
                    lost.set()
                    return

    def check() -> None:
        if lost.is_set():
            raise Busy(f"{busy} (this process did not answer for {mine.lease:g} s, and another one took over)")

    thread = threading.Thread(target=renew, daemon=True, name=f"claim {file.name}")
    thread.start()
    try:
        yield check
    finally:
        released.set()
        thread.join()
        with contextlib.suppress(OSError):
            _release(file, mine)


@dataclass(frozen=True)
class _Claim:
    """A claim as its file has it. `machine`, `pid` and `start` name a process; `age` is in seconds, when it was read."""

    file: Path
    token: str
    machine: str
    pid: int
    start: str
    lease: float
    age: float = field(default=0.0, compare=False)

    @property
    def is_over(self) -> bool:
        """Whether its holder is gone."""
        if self.start and self.machine == _machine():
            return _start(self.pid) != self.start
        return self.age > self.lease


def _take(root: Path) -> _Claim | None:
    """A new claim, or None if somebody holds it, or was quicker."""
    last = _newest(root)
    if last is not None and not last.is_over:
        return None
    pid = os.getpid()
    lease = float(os.environ.get("MOEJAX_LEASE", LEASE))
    file = root if last is None else _successor(root, last.token)
    mine = _Claim(file, uuid.uuid4().hex[:12], _machine(), pid, _start(pid), lease)
    try:
        with file.open("x") as stream:
            json.dump({name: getattr(mine, name) for name in _KEPT}, stream)
    except FileExistsError:
        return None
    if _newest(root) != mine:  # what it was to follow has been released meanwhile
        file.unlink(missing_ok=True)
        return None
    return mine


def _release(root: Path, mine: _Claim) -> None:
    chain = list(_chain(root))
    if chain and chain[-1] == mine:
        for claim in chain:  # the first one first: without it the others are nobody's
            claim.file.unlink(missing_ok=True)


def _newest(root: Path) -> _Claim | None:
    return next(iter(reversed(list(_chain(root)))), None)


def _chain(root: Path) -> Iterator[_Claim]:
    """The claim and its successors, those of holders that are gone first."""
    file = root
    while (claim := _read(file)) is not None:
        yield claim
        file = _successor(root, claim.token)


def _successor(root: Path, token: str) -> Path:
    return root.with_name(f"{root.name}.{token}")


def _read(file: Path) -> _Claim | None:
    """A claim; None if there is none. One that cannot be read is just being written, or its holder did not live to write it."""
    try:
        with file.open() as stream:  # opened: a network file system may know the times of closed files from memory
            written, text = os.fstat(stream.fileno()).st_mtime, stream.read()
    except FileNotFoundError:
        return None
    found: dict[str, Any] = {"token": "unreadable", "machine": "", "pid": 0, "start": "", "lease": LEASE}
    with contextlib.suppress(ValueError, KeyError, TypeError):
        read = json.loads(text)
        found = {name: read[name] for name in _KEPT}
    return _Claim(file, **found, age=_now(file.parent) - written)


def _now(folder: Path) -> float:
    """The time by the clock of a folder's file system, which may be a server's."""
    with tempfile.TemporaryFile(dir=folder) as probe:
        os.utime(probe.fileno())
        return os.fstat(probe.fileno()).st_mtime


def _machine() -> str:
    """What tells this machine, since it was last started, and this container from others."""
    parts = [platform.node()]
    with contextlib.suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


def _start(pid: int) -> str:
    """When a process of this machine was started, which tells it from a later one of the same number; '' if there is none, or nobody knows."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else rest[18]


_KEPT = ("token", "machine", "pid", "start", "lease")
