"""The two ways in which a run ends before its last step: a signal, and a number that is not finite."""

import signal
import threading
from collections import deque
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np


class Interrupted(SystemExit):
    """A signal ended the run after a checkpoint was saved. Its exit code is 128 + the signal's number, as a shell's."""

    def __init__(self, signum: int, step: int):
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
    """Inside the `with` block SIGTERM and SIGINT are noted in `received` instead of ending the process.

    A second signal of the same kind does what it did before. Outside of the main thread Python allows no handlers, and
    signals keep their meaning.
    """

    WATCHED = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.received: int | None = None
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            self._old = {signum: signal.signal(signum, self._note) for signum in self.WATCHED}
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._old.items():
            signal.signal(signum, handler)
        self._old = {}

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.received = signum
        signal.signal(signum, self._old[signum])


class RecentBatches:
    """Example ids of the last batches, so that a step found bad some steps later can be named."""

    def __init__(self, size: int):
        self._batches: deque[tuple[int, np.ndarray]] = deque(maxlen=size)

    def add(self, step: int, example_ids: np.ndarray) -> None:
        self._batches.append((step, example_ids))

    def ids(self, step: int) -> list[int]:
        return next((ids.tolist() for s, ids in self._batches if s == step), [])
