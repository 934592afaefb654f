"""Where runs are trained: in this process, or in several worker processes side by side.

Both take jobs and give events, one after the other: `(worker, kind, value)`. Kinds are

    progress   the trainer's report (of workers; in this process a run's line is told directly)
    done       the run is there; the value is whether another process had trained it
    busy       another process trains it, or what it starts from
    mistake    its config cannot be trained: the error, in one line
    failed     another error, in one line
"""

import contextlib
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any, Protocol, Self

from experiments.cache import Run, run_label
from experiments.claims import Busy
from experiments.trainer import Job, Trainer
from moejax.core.errors import ConfigError
from moejax.core.text import tell

# One thread each: of XLA, whose sums depend on how many threads share them, and of the libraries that NumPy calls.
THREADS = ("PJRT_NPROC", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
LEAVE = 3.0  # seconds in which a worker that has nothing to save has to end
Event = tuple[int, str, Any]


class Place(Protocol):
    """Where runs are trained. `divides`: among workers, each of which had better go on with an arm whose program it has."""

    divides: bool

    def ensure(self, count: int) -> None:
        """Has `count` workers, or as many as there may be."""

    def idle(self) -> list[int]:
        """Workers that have nothing to do."""

    def start(self, worker: int, job: Job, progress: Callable[[Any], None]) -> None:
        """Gives a job to a worker that has none."""

    def next(self) -> Event:
        """Waits for the next event."""

    def signals(self) -> contextlib.AbstractContextManager[None]:
        """Inside, signals stop the command in an orderly way."""


class Here:
    """This process: it has one worker, which is done when `start` returns.

    `together` with other processes an error ends the command: the others cannot know of it.
    """

    divides = False

    def __init__(self, trainer: Trainer, together: bool):
        self._trainer, self._together = trainer, together
        self._events: deque[Event] = deque()

    def ensure(self, count: int) -> None:
        pass

    def idle(self) -> list[int]:
        return [] if self._events else [0]

    def start(self, worker: int, job: Job, progress: Callable[[Any], None]) -> None:
        try:
            run: Run = self._trainer.train(job, progress)
            self._events.append((worker, "done", run.cached))
        except Busy:
            self._events.append((worker, "busy", None))
        except ConfigError:
            raise
        except Exception as error:
            if self._together:
                raise
            self._events.append((worker, "failed", self._trainer.describe(error, job)))

    def next(self) -> Event:
        return self._events.popleft()

    def signals(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()  # `fit` does


class Pool:
    """Worker processes, of one thread each, that live as long as the command. Use as a context manager.

    A signal to the command stops them all: runs under way save a checkpoint. What they print is printed here. A worker that ends by
    itself has failed its run, and another takes its place.
    """

    divides = True

    def __init__(self, trainer: Trainer, most: int, environment: Mapping[str, str]):
        """`environment`: variables of the workers, beside those that hold them to one thread."""
        self._trainer, self.most = pickle.dumps(trainer), most
        self._environment = {**os.environ, **dict.fromkeys(THREADS, "1"), **environment}
        self._environment["PYTHONPATH"] = os.pathsep.join(place or os.getcwd() for place in sys.path)
        self._workers: dict[int, _Worker] = {}
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._started = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._wind_down()

    def ensure(self, count: int) -> None:
        while len(self._workers) < min(count, self.most):
            self._workers[self._started] = _Worker(self._started, self._trainer, self._environment, self._events)
            self._started += 1

    def idle(self) -> list[int]:
        return [number for number, worker in self._workers.items() if worker.job is None]

    def start(self, worker: int, job: Job, progress: Callable[[Any], None]) -> None:
        self._workers[worker].start(job)

    def next(self) -> Event:
        while True:
            number, kind, value = self._events.get()
            if kind == "signal":
                self._stop(value)
            worker = self._workers.get(number)
            if worker is None:
                continue
            if kind == "stopped":
                worker.step = value
            elif kind == "ended":
                del self._workers[number]
                if worker.job is not None:
                    return number, "failed", _how(value)
            elif worker.job is not None:
                if kind == "progress":
                    worker.report = value
                else:
                    worker.job = None
                return number, kind, value

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        handlers = {}
        if threading.current_thread() is threading.main_thread():
            handlers = {signum: signal.signal(signum, self._note) for signum in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for signum, handler in handlers.items():
                signal.signal(signum, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._events.put((-1, "signal", signum))

    def _stop(self, signum: int) -> None:
        """Stops the workers, says in one line how far they were, and ends the command."""
        working = [worker for worker in self._workers.values() if worker.job is not None]
        self._wind_down()
        runs = ", ".join(worker.told() for worker in working)
        tell(f"stopped by signal {signum}{': ' if runs else ''}{runs}; the same command goes on from there")
        raise SystemExit(128 + signum)

    def _wind_down(self) -> None:
        """Ends all workers: those that have something to save may take their time, unless a signal comes."""
        for worker in self._workers.values():
            worker.quiet = worker.job is not None
            worker.stop() if worker.job is not None else worker.dismiss()
        began, hurry = time.monotonic(), False
        while any(worker.alive for worker in self._workers.values()) or not self._events.empty():
            late = time.monotonic() - began > LEAVE
            for worker in self._workers.values():
                if worker.alive and (hurry or (late and not worker.may_save)):
                    worker.kill()
            with contextlib.suppress(queue.Empty):
                number, kind, value = self._events.get(timeout=0.1)
                hurry = hurry or kind == "signal"
                if kind == "stopped":
                    self._workers[number].step = value


class _Worker:
    """One process, and what is known of it."""

    def __init__(self, number: int, trainer: bytes, environment: Mapping[str, str], events: "queue.SimpleQueue[Event]"):
        self.number, self.job, self.report, self.step, self.quiet = number, None, None, None, False
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "experiments.worker", str(theirs.fileno())],
                env=dict(environment),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                process_group=0,  # of its own: a Ctrl-C reaches the command alone
            )
        self._connection = Connection(ours.detach())
        self._events = events
        self._reader = threading.Thread(target=self._read, daemon=True, name=f"reads worker {number}")
        for thread in (
            self._reader,
            threading.Thread(target=self._echo, daemon=True, name=f"echoes worker {number}"),
            threading.Thread(target=self._watch, daemon=True, name=f"watches worker {number}"),
        ):
            thread.start()
        self._send(trainer)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def may_save(self) -> bool:
        """Whether its run has done something that is worth a checkpoint."""
        return self.job is not None and self.report is not None and self.report.phase in ("train", "eval")

    def start(self, job: Job) -> None:
        self.job, self.report, self.step = job, None, None
        self._send(pickle.dumps(job))

    def dismiss(self) -> None:
        """Lets it end when it has nothing to do."""
        self._send(b"")

    def stop(self) -> None:
        """Stops it where nothing is lost."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()

    def kill(self) -> None:
        self._process.kill()

    def told(self) -> str:
        """Where its run is."""
        where = f"after step {self.step}" if self.step else "before its first step"
        if self.step is None and self.report is not None and self.report.step:
            where = f"after step {self.report.step}, without a checkpoint of it"
        return f"{run_label(self.job.arm, self.job.seed)} {where} of {int(self.job.config.train.steps)}"

    def _send(self, message: bytes) -> None:
        with contextlib.suppress(OSError):  # it has ended: that is an event of its own
            self._connection.send_bytes(message)

    def _read(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                self._events.put((self.number, *self._connection.recv()))

    def _echo(self) -> None:
        for line in self._process.stdout:
            if not self.quiet:
                tell(line.rstrip("\n"))

    def _watch(self) -> None:
        status = self._process.wait()
        self._reader.join(LEAVE)  # what it said before comes before
        self._events.put((self.number, "ended", status))


def _how(status: int) -> str:
    """How a process ended that should not have."""
    if status >= 0:
        return f"its process ended with status {status}"
    return f"killed (signal {-status}{': out of memory?' if status == -signal.SIGKILL else ''})"
