"""Finished trainings, found again by what was trained: arms that studies share are trained once.

A run lives in `<runs>/trained/<key>/`, where the key hashes the resolved config without what cannot change a number
(`moejax.train.identity`, blocks that the model does not use), the seed and `NUMERICS_VERSION`. `run.json` is written last: a directory
without it is an interrupted training, which `fit` resumes. It vouches for itself and for the files beside it; where one of them is
not what was written, `run.json` is moved aside, and `fit` makes again what is missing, from a checkpoint if it can.

What a run starts from (`init`, a task's teacher) is part of its config, and so of its key. The run of another config that it starts
from is a run like any other: it is trained here, once, for all that name it.
"""

import contextlib
import fnmatch
import hashlib
import json
import math
import shutil
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from experiments import environment
from experiments.claims import Busy, claimed
from moejax.core.files import changed, digest, read_lines, read_sealed, set_aside, write_sealed
from moejax.train import identity

# Bump when a change to the library changes the numbers of a training: every cached run is then trained afresh.
# `canary.py` notices when this was forgotten.
NUMERICS_VERSION = 4
SIZES = ("params", "active_params", "trainable_params", "flops_per_step", "steps")
RESULT_FIELDS = (*SIZES, "tokens_per_step", "state_bytes", "seconds", "first_step_seconds")
FILES = ("result.json", "metrics.jsonl", "timings.jsonl")  # what `run.json` vouches for, as far as it is there


@dataclass(frozen=True)
class Run:
    """One finished training.

    Attributes:
      metrics: name -> final value: those of the last evaluation, of the last logged step, and sizes and times.
      history: the logged lines, in order of step.
      meta: commit, versions, device, date.
      cached: it was trained before this command.
      diverged: why the training stopped early, where its numbers were no longer finite; empty otherwise.
    """

    arm: str
    seed: int
    metrics: Mapping[str, float]
    history: Sequence[Mapping[str, Any]] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)
    path: Path | None = None
    cached: bool = False
    diverged: str = ""

    def matching(self, metric: str) -> list[float]:
        """The values of the metrics that `metric` names: one, or several where it has a `*`."""
        if metric in self.metrics:
            return [float(self.metrics[metric])]
        return [float(v) for k, v in sorted(self.metrics.items()) if fnmatch.fnmatchcase(k, metric)]

    def value(self, metric: str) -> float:
        """The mean of `matching(metric)`; nan if there are none."""
        found = self.matching(metric)
        return sum(found) / len(found) if found else math.nan

    def blocks(self, metric: str) -> np.ndarray | None:
        """`metric` on each block of the final evaluation (`moejax.train.blocks`); None if it was not kept."""
        names = [metric] if metric in self.metrics else [k for k in sorted(self.metrics) if fnmatch.fnmatchcase(k, metric)]
        last = self.history[-1] if self.history else {}
        found = [last.get(f"{name}/blocks") for name in names]
        if not found or None in found or len({len(each) for each in found}) > 1:
            return None
        return np.mean(np.array(found, float), 0)

    def curve(self, metric: str) -> tuple[list[int], list[float]]:
        """Steps and values of `metric` over the training."""
        points = [(int(row["step"]), float(row[metric])) for row in self.history if row.get(metric) is not None]
        return [p[0] for p in points], [p[1] for p in points]

    def last(self, pattern: str) -> dict[str, Any]:
        """The newest logged value of each metric that matches `pattern`, lists included."""
        names = sorted({k for row in self.history for k in row if fnmatch.fnmatchcase(k, pattern)})
        return {k: next(row[k] for row in reversed(self.history) if k in row) for k in names}


class Cache:
    """The runs under one directory."""

    def __init__(self, root: Path):
        self.root = Path(root)

    def path(self, config: ConfigDict, seed: int) -> Path:
        """Where the run of `config` with `seed` lives, finished or not."""
        return self.root / "trained" / key(config, seed)

    def has(self, config: ConfigDict, seed: int) -> bool:
        """Whether the run has finished, and is what was written."""
        path = self.path(config, seed)
        return (path / "run.json").exists() and not find_damage(path)

    def load(self, config: ConfigDict, seed: int, arm: str) -> Run | None:
        """The finished run, or None: also if it is damaged."""
        return read_run(self.path(config, seed), arm, seed, cached=True)

    def train(
        self,
        config: ConfigDict,
        seed: int,
        arm: str,
        fit: Callable[..., Any],
        progress: Callable[..., None],
        label: str = "",
        wait: bool = False,
    ) -> Run:
        """Trains what is not finished yet, or goes on with it, and returns the run.

        Args:
          label: of the run in progress reports; its arm and seed if left out.
          wait: for another process that trains the run, or one that it starts from; without it, that is an error.

        Raises:
          Busy: another process trains it, or has taken it over.
        """
        from moejax.parallel import hosts

        path, label = self.path(config, seed), label or run_label(arm, seed)
        with self._claimed(path, _waiting(progress, label, config) if wait else None) as check:
            # Another process may have finished it while this one was busy with other arms.
            if hosts.share(self.has(config, seed)):
                return read_run(path, arm, seed, cached=True)
            if hosts.is_first() and (path / "run.json").exists():
                set_aside(path / "run.json", "run", find_damage(path) or "")

            def report(state: Any) -> None:
                check()
                progress(state)

            return train_in(path, config, seed, arm, fit, report, self.starts(fit, wait), label)

    def starts(self, fit: Callable[..., Any], wait: bool = False) -> Callable[..., Path]:
        """What `fit` is given as `resolve`: trains, or finds, the runs that others start from, and gives their folders."""

        def resolve(config: Mapping[str, Any], seed: int, progress: Callable[..., None], label: str) -> Path:
            from moejax.parallel import hosts
            from moejax.train import StartDiverged

            config = ConfigDict(dict(config))
            found = self.load(config, seed, label) if hosts.share(self.has(config, seed)) else None
            run = found or self.train(config, seed, label, fit, progress, label, wait)
            if run.diverged:
                raise StartDiverged(label, run.diverged)
            return self.path(config, seed)

        return resolve

    def forget(self, config: ConfigDict, seed: int) -> None:
        """Deletes a finished run, so that it is trained again. An interrupted one stays, for the same command to go on with.

        Raises:
          Busy: another process trains it.
        """
        from moejax.parallel import hosts

        path = self.path(config, seed)
        with self._claimed(path):
            if hosts.is_first() and (path / "run.json").exists():
                shutil.rmtree(path)
            hosts.barrier()

    @contextlib.contextmanager
    def _claimed(self, path: Path, wait: Callable[[], None] | None = None) -> Iterator[Callable[[], None]]:
        """Has the run in `path` for this process, or for those that train together, of which the first one holds the claim."""
        from moejax.parallel import hosts

        with contextlib.ExitStack() as stack:
            check, refused = (lambda: None), ""
            if hosts.is_first():
                busy = f"another process is training in {path}; wait for it, or choose another --runs=DIR"
                try:
                    check = stack.enter_context(claimed(path.with_suffix(".claim"), busy, wait))
                except Busy as error:
                    refused = str(error)
            if refused := hosts.share(refused):
                raise Busy(refused)
            yield check


def _waiting(progress: Callable[..., None], label: str, config: ConfigDict) -> Callable[[], None]:
    """Reports that a run waits for another process."""
    from moejax.train.results import Progress

    return lambda: progress(Progress(label, 0, int(config.train.steps), "waiting"))


def train_in(
    path: Path,
    config: ConfigDict,
    seed: int,
    arm: str,
    fit: Callable[..., Any],
    progress: Callable[..., None],
    starts: Callable[..., Path],
    label: str = "",
) -> Run:
    """Calls `fit` in directory `path` and writes `run.json` when it has ended; of several processes, the first writes.

    `starts` trains or finds the runs that this one starts from, see `Cache.starts`. A training whose numbers are no longer finite has ended too: that an arm diverges is a result.
    """
    from moejax.parallel import hosts
    from moejax.train import NonFiniteLoss

    diverged, metrics = "", {}
    try:
        label = label or run_label(arm, seed)
        result = fit(config, seed=seed, workdir=str(path), progress=progress, label=label, resolve=starts)
    except NonFiniteLoss as error:
        diverged = str(error)
    else:
        metrics = {name: float(getattr(result, name)) for name in RESULT_FIELDS} | dict(result.metrics)
    timings, history = (_lines(path / name) for name in ("timings.jsonl", "metrics.jsonl"))
    speeds = [row["tokens_per_second"] for row in timings if row.get("tokens_per_second")]
    if speeds:
        metrics["tokens_per_second"] = statistics.median(speeds)
    record = {
        "arm": arm,
        "seed": seed,
        "numerics": NUMERICS_VERSION,
        "diverged": diverged,
        "metrics": {**_last_scalars(history), **metrics},
        "meta": environment.describe(),
        "files": {name: digest(path / name) for name in FILES if (path / name).exists()},
    }
    if hosts.is_first():
        write_sealed(path / "run.json", record)
    hosts.barrier()
    return _as_run(record, history, path, arm, seed, cached=False)


def run_label(arm: str, seed: int) -> str:
    """What a run is called where it reports."""
    return f"{arm} seed {seed}"


def read_run(path: Path, arm: str, seed: int, cached: bool) -> Run | None:
    """The finished run in `path`, or None if it has not finished, or is not what was written."""
    if not (path / "run.json").exists() or find_damage(path):
        return None
    return _as_run(read_sealed(path / "run.json"), _lines(path / "metrics.jsonl"), path, arm, seed, cached)


def find_damage(path: Path) -> str | None:
    """What is wrong with the finished run in `path`, or None."""
    try:
        return changed(path, read_sealed(path / "run.json")["files"])
    except (ValueError, KeyError) as error:
        return f"run.json: {error}"


def key(config: ConfigDict, seed: int) -> str:
    """Names a training by everything that can change its numbers: files that the config names count by what is in them."""
    from moejax.train.same_run import files

    named = config.copy_and_resolve_references().to_dict()
    what = {"config": essence(config), "files": files(named), "seed": seed, "numerics": NUMERICS_VERSION}
    text = json.dumps(what, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def essence(config: ConfigDict) -> dict[str, Any]:
    """The config as plain values, without what is cosmetic and without blocks that nothing in the model names.

    Configs inside it, of runs that it starts from, likewise.
    """
    return _used_everywhere(identity.essence(config.copy_and_resolve_references().to_dict()))


def _used_everywhere(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    plain = _used_blocks(value) if identity.is_config(value) else value
    return {name: _used_everywhere(part) for name, part in plain.items()}


def _used_blocks(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without blocks that nothing in its model names."""
    plain = dict(config)
    model = plain.get("model", {})
    blocks = model.get("blocks", {})
    rest = {k: v for k, v in model.items() if k != "blocks"}
    if blocks and "pattern" in rest:
        # A block that is named anywhere else in the model, whatever by, stays.
        unused = {name for name in blocks if name not in _strings([rest, *(b for n, b in blocks.items() if n != name)])}
        plain["model"] = {**rest, "blocks": {name: block for name, block in blocks.items() if name not in unused}}
    return plain


def _as_run(
    record: Mapping[str, Any], history: Sequence[Mapping[str, Any]], path: Path, arm: str, seed: int, cached: bool
) -> Run:
    return Run(arm, seed, record["metrics"], history, record["meta"], path, cached, record["diverged"])


def _lines(file: Path) -> list[dict[str, Any]]:
    """The lines of a JSON-lines file that the trainer wrote; none if there is no file."""
    return read_lines(file) if file.exists() else []


def _last_scalars(history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    last: dict[str, float] = {}
    for row in history:
        last |= {k: float(v) for k, v in row.items() if k != "step" and isinstance(v, int | float)}
    return last


def _strings(value: Any) -> set[str]:
    match value:
        case str():
            return {value}
        case Mapping():
            return _strings(list(value.values()))
        case list() | tuple():
            return set().union(*map(_strings, value))
    return set()
