"""What TensorBoard shows of a run: written at once, by the thread that trains.

A writer with a thread and a queue of its own, as tensorboardX has, stops the training for good when that thread ends: a clock that is
set back far enough is enough. A line of metrics is a few hundred bytes, so nothing is gained by one.
"""

import contextlib
import os
import socket
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

# tensorboardX imports PyTorch where there is one, for two seconds, and does without it where there is none.
_torch = sys.modules.setdefault("torch", None)
try:
    from tensorboardX.proto import event_pb2
    from tensorboardX.record_writer import RecordWriter
    from tensorboardX.summary import histogram, scalar
finally:
    if _torch is None:
        del sys.modules["torch"]

# TensorBoard's own: zero, and powers of 1.1 on both sides of it.
_POWERS = (1e-12 * 1.1 ** np.arange(774)).tolist()
BINS = [-power for power in reversed(_POWERS)] + [0.0] + _POWERS


class Events:
    """One event file. What cannot be written is left out, with a word: metrics.jsonl is the record."""

    def __init__(self, folder: Path, step: int):
        """`step`: what an earlier process wrote past it is hidden; 0 hides nothing."""
        # Later processes sort after earlier ones, also within a second.
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file: RecordWriter | None = None
        with self._or_none():
            self._file = RecordWriter(str(folder / name))
            self._add(file_version="brain.Event:2")
            if step:
                self._add(step=step + 1, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    def write(self, step: int, line: Mapping[str, Any]) -> None:
        """A line of metrics: numbers as curves, lists as histograms."""
        if self._file is None:
            return
        with self._or_none():
            for name, value in line.items():
                made = histogram(name, np.asarray(value), BINS) if isinstance(value, list) else scalar(name, value)
                self._add(step=step, summary=made)
            self._file.flush()

    def close(self) -> None:
        with self._or_none():
            if self._file is not None:
                self._file.close()

    def _add(self, **fields: Any) -> None:
        self._file.write(event_pb2.Event(wall_time=time.time(), **fields).SerializeToString())

    @contextlib.contextmanager
    def _or_none(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._file = None
            warnings.warn(f"TensorBoard events are left out from here on ({error}); metrics.jsonl has everything", stacklevel=4)
