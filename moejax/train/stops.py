"""The two ways in which a run ends before its last step: a signal, and a number that is not finite."""

import contextlib
import os
import signal
import threading
from collections import deque
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np


class Interrupted(SystemExit):
    """A signal ended the run after a checkpoint of `step` was saved, or before anything could be lost (None). Its exit code is 128 + the
    signal's number, as a shell's."""

    def __init__(self, signum: int, step: int | None):
        self.signum, self.step = signum, step
        super().__init__(128 + signum)


class NonFiniteLoss(RuntimeError):
    """The loss, gradient or parameters of a step are not finite.

    Attributes:
      step: number of the update, from 1.
      example_ids: the batch it was computed from.
      checkpoint: the newest checkpoint, which is from before; None if there is none.
    """

    def __init__(self, step: int, example_ids: list[int], checkpoint: Path | None):
        self.step, self.example_ids, self.checkpoint = step, example_ids, checkpoint
        last = "there is no checkpoint from before" if checkpoint is None else f"the last good checkpoint is {checkpoint}"
        super().__init__(
            f"loss, gradient or parameters are not finite at step {step}, computed from example_ids={example_ids}; {last}"
        )


class StartDiverged(NonFiniteLoss):
    """The run that this one starts from has diverged: there is nothing to start from."""

    def __init__(self, label: str, reason: str):
        self.step, self.example_ids, self.checkpoint = 0, [], None
        RuntimeError.__init__(self, f"{label} diverged: {reason}")


class Signals:
    """Inside the `with` block the first SIGTERM or SIGINT stops the run at the next safe point, and the second at once.

    Until `defer` is called nothing can be lost, and the first signal raises `Interrupted` where the program is. From then on it is noted
    in `received`, and the run ends itself.

    A second signal does what signals did before. Python cannot do it while the main thread is busy in compiled code, in a long
    compilation for example: if the block has not been left `GRACE` seconds later, the process ends, with the signal's exit code.

    Outside of the main thread Python allows no handlers, and signals keep their meaning.
    """

    WATCHED = (signal.SIGTERM, signal.SIGINT)
    GRACE = 2.0

    def __init__(self) -> None:
        self.received: int | None = None
        self._deferred = False
        self._old: dict[int, Any] = {}
        self._left = threading.Event()

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            self._old = {signum: signal.signal(signum, self._note) for signum in self.WATCHED}
            read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            # Python writes a signal's number there the moment it comes, whatever the main thread does.
            self._old_pipe = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(read, self._old_pipe), daemon=True, name="signals").start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._left.set()
        if self._old:
            signal.set_wakeup_fd(self._old_pipe, warn_on_full_buffer=False)
            os.close(self._write)
        self._restore()

    def defer(self) -> None:
        """From here on a signal is noted, and raises nothing."""
        self._deferred = True

    def _restore(self) -> None:
        for signum, handler in self._old.items():
            signal.signal(signum, handler)
        self._old = {}

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.received = signum
        for watched, handler in self._old.items():
            signal.signal(watched, handler)
        if not self._deferred:
            raise Interrupted(signum, None)

    def _watch(self, read: int, old_pipe: int) -> None:
        count = 0
        while data := os.read(read, 1):
            if old_pipe >= 0:
                with contextlib.suppress(OSError):
                    os.write(old_pipe, data)
            count += data[0] in self.WATCHED
            if count == 2 and not self._left.wait(self.GRACE):
                os._exit(128 + data[0])
        os.close(read)


class RecentBatches:
    """Example ids of the last batches, so that a step found bad some steps later can be named."""

    def __init__(self, size: int):
        self._batches: deque[tuple[int, np.ndarray]] = deque(maxlen=size)

    def add(self, step: int, example_ids: np.ndarray) -> None:
        self._batches.append((step, example_ids))

    def ids(self, step: int) -> list[int]:
        return next((ids.tolist() for s, ids in self._batches if s == step), [])
