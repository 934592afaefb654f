"""What a run tells while it runs, and what it leaves."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moejax.core.files import changed, digest, read_lines, read_sealed, write_sealed
from moejax.train.metrics import LOGS

RESULT = "result.json"


@dataclasses.dataclass(frozen=True)
class Progress:
    """One report of a run.

    Attributes:
      label: the run's name; 'init.source of NAME' while what it starts from is trained.
      step, steps: updates done, updates in all.
      phase: 'data', 'compile', 'train' or 'eval'; 'waiting' for another process that trains what the run starts from.
      tokens_per_second: smoothed; 0 before the first measurement. Examples rather than tokens for image tasks.
      loss: last logged task loss in nats, or None.
      seconds_left: for the rest of the training, or None.
    """

    label: str
    step: int
    steps: int
    phase: str
    tokens_per_second: float = 0.0
    loss: float | None = None
    seconds_left: float | None = None


ProgressCallback = Callable[[Progress], None]


@dataclasses.dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
      metrics: numbers of the final evaluation, named 'eval/...'.
      history: the lines of metrics.jsonl.
      steps: updates done.
      seconds: wall-clock time of training, over all processes that took part.
      first_step_seconds: from the call of `fit` to the end of its first step: data, start-up and compilation, without the
        training of runs that it starts from.
      params: number of parameters.
      active_params: number of parameters one token uses.
      trainable_params: number of parameters that learn, in some steps at least.
      flops_per_step: floating point operations of the matrix products of one train step.
      tokens_per_step: tokens (or examples) of one train step, padding included; 0 in results of before it was kept, as is the next.
      state_bytes: of parameters and optimizer state, on all devices together.
      variables: the final variables (`{'params': ..., 'router_state': ...}`); with a mesh, split over its devices.
    """

    metrics: dict[str, float]
    history: list[dict[str, Any]]
    steps: int
    seconds: float
    first_step_seconds: float
    params: int
    active_params: int
    trainable_params: int
    flops_per_step: float
    variables: dict[str, Any] = dataclasses.field(repr=False)
    tokens_per_step: int = 0
    state_bytes: int = 0

    def write(self, workdir: Path) -> None:
        """Writes result.json: everything but the history and the variables, which lie beside it, and checksums of what was logged."""
        kept = {k: v for k, v in sorted(vars(self).items()) if k not in ("history", "variables")}
        logs = {name: digest(workdir / name) for name in LOGS if (workdir / name).exists()}
        write_sealed(workdir / RESULT, kept | {"logs": logs}, indent=2)


def result_damage(workdir: Path) -> str | None:
    """What is wrong with the result that was written in `workdir`, or with what was logged on the way to it; None if nothing is."""
    try:
        return changed(workdir, read_sealed(workdir / RESULT)["logs"])
    except ValueError as error:
        return str(error)


def read_result(workdir: Path, variables: dict[str, Any]) -> RunResult:
    """The result that was written in `workdir`, with the `variables` of its checkpoint."""
    kept = read_sealed(workdir / RESULT)
    del kept["logs"]
    return RunResult(**kept, history=read_lines(workdir / LOGS[0]), variables=variables)


class Speed:
    """Smoothed throughput. `halving` reports old are worth half a new one."""

    def __init__(self, step: int, now: float, halving: float = 2.0):
        self._step, self._now = step, now
        self._keep = 0.5 ** (1.0 / halving)
        self.steps_per_second = 0.0

    def update(self, step: int, now: float) -> float:
        """Steps per second after reaching `step` at time `now` in seconds."""
        if step > self._step and now > self._now:
            latest = (step - self._step) / (now - self._now)
            old = self.steps_per_second or latest
            self.steps_per_second = self._keep * old + (1.0 - self._keep) * latest
            self._step, self._now = step, now
        return self.steps_per_second

    def skip(self, now: float) -> None:
        """The time since the last update went into something else than steps."""
        self._now = now
