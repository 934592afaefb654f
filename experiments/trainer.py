"""One run at a time: what a process does that trains runs, be it the command's own or one of its workers."""

import contextlib
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments.cache import Cache, Run, read_run, train_in
from experiments.terminal import short, told, trouble
from moejax.core.text import tell

FAILURE = "failure.txt"  # in the folder of a run that failed: the traceback


@dataclass(frozen=True)
class Job:
    """A run that is to be trained; `wait`: for other processes that train it, or one that it starts from."""

    arm: str
    seed: int
    config: ConfigDict
    wait: bool = False


@dataclass(frozen=True)
class Trainer:
    """Trains runs in the cache below `runs`, or in `workdir` (`apart`: in a folder a seed there) with their starts in the cache."""

    runs: Path
    fit: Callable[..., Any]
    workdir: Path | None = None
    apart: bool = False

    def path(self, config: ConfigDict, seed: int) -> Path:
        """The folder of a run."""
        if self.workdir is None:
            return Cache(self.runs).path(config, seed)
        return self.workdir / f"seed{seed}" if self.apart else self.workdir

    def find(self, config: ConfigDict, seed: int, arm: str) -> Run | None:
        """The run, if it had finished before this command."""
        from moejax.parallel import hosts

        cache = Cache(self.runs)
        if self.workdir is not None or not hosts.share(cache.has(config, seed)):
            return None
        return cache.load(config, seed, arm)

    def train(self, job: Job, progress: Callable[[Any], None]) -> Run:
        """Trains a run, or goes on with it.

        Raises:
          Busy: another process trains it or one that it starts from, and the job says not to wait.
        """
        cache, path = Cache(self.runs), self.path(job.config, job.seed)
        with contextlib.suppress(OSError):
            (path / FAILURE).unlink(missing_ok=True)
        if self.workdir is None:
            return cache.train(job.config, job.seed, job.arm, self.fit, progress, wait=job.wait)
        return train_in(path, job.config, job.seed, job.arm, self.fit, progress, cache.starts(self.fit, job.wait))

    def read(self, job: Job, cached: bool) -> Run:
        """The run that a worker has trained."""
        run = read_run(self.path(job.config, job.seed), job.arm, job.seed, cached)
        assert run is not None, "a worker ends with a run, or says that it has none"
        return run

    def describe(self, error: Exception, job: Job) -> str:
        """A failure in one line. A traceback that is worth reading is in the run's folder, which the line names."""
        if os.environ.get("MOEJAX_TRACEBACK"):
            tell("".join(traceback.format_exception(error)).rstrip())
        if reason := trouble(error):
            return reason
        file = self.path(job.config, job.seed) / FAILURE
        where = traceback.extract_tb(error.__traceback__)[-1]
        line = f"{type(error).__name__}: {told(error)} ({short(Path(where.filename))}:{where.lineno})"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(traceback.format_exception(error)))
        except OSError:
            return line
        return f"{line}; the whole traceback is in {short(file)}"
