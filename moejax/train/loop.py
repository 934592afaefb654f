"""`fit`: from a config and a seed to a trained model, across kills, signals and damaged disks.

    result = fit(config, seed=0, workdir='runs/x')

The same call goes on where an earlier process stopped. What it writes to metrics.jsonl, and the parameters it ends with, are
the same bits whether it was stopped or not: both depend on (config, seed) alone.

`config.init` says what it starts from (see `moejax.train.starts`). What starts from the run of another config waits until that
run has ended, and a run that was killed while it waited goes on with the other one.

`config.mesh` says how the training is split over devices (see `moejax.parallel.mesh`), of one process or of several that call
`fit` together (see `moejax.parallel.hosts`). Numbers then agree with those of one device to rounding, and a run may go on on
another mesh, or with another number of processes, than it began on. Of several processes, which share the folder, the first
writes all files but the checkpoints, to which each adds its part; all of them stop together.
"""

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict

from moejax import data
from moejax.core.errors import ConfigError
from moejax.core.fields import Seed, check_value
from moejax.core.files import locked, set_aside, write_json
from moejax.core.text import tell
from moejax.parallel import Exchange, batches, hosts, make_parallel
from moejax.train.blocks import block_values
from moejax.train.checkpoints import Checkpoints, load
from moejax.train.fits import check_fits, held, needed
from moejax.train.identity import check_equal
from moejax.train.metrics import Line, MetricLog, SilentLog, expand, numbers
from moejax.train.program import Program, get_program
from moejax.train.readers import Resolve, ResolveRun, train_below
from moejax.train.results import RESULT, Progress, ProgressCallback, RunResult, Speed, read_result, result_damage
from moejax.train.same_run import batch_contents, check_same_run, described, files
from moejax.train.settings import (
    PLACE,
    CheckpointSettings,
    EvalSettings,
    TrainSettings,
    normalized,
    plain,
    section,
)
from moejax.train.starts import Init, frozen_models, parse_init, starting
from moejax.train.step import TrainState
from moejax.train.stops import Interrupted, NonFiniteLoss, RecentBatches, Signals

MakeIterator = Callable[..., Any]


def fit(
    config: Mapping[str, Any] | ConfigDict,
    seed: int,
    workdir: str | Path,
    progress: ProgressCallback | None = None,
    label: str = "",
    *,
    model: nn.Module | None = None,
    make_iterator: MakeIterator | None = None,
    info: Any = None,
    resolve: ResolveRun | None = None,
) -> RunResult:
    """Trains one model, on this process's default device or on the devices of `config.mesh`.

    Args:
      config: sections model, data, task, optimizer, train, and optionally adapters, init, trainable, eval, checkpoint, mesh and
        exchange; see `settings.py`.
      seed: of parameters, data order and all noise: from 0 to 2**32 - 1.
      workdir: folder of the run. Gets config.json, metrics.jsonl, timings.jsonl, TensorBoard events, checkpoints/, and in the
        end result.json. A run that was cut off goes on from its newest good checkpoint; a finished one is read, not repeated. What
        numbers do not depend on (`moejax.train.identity`) may have changed since, and `train.steps` may have grown if the
        learning rates so far stay what they were.
      progress: called with a `Progress` whenever a phase begins and whenever metrics are logged; of several processes, in the
        first.
      label: name of the run in progress reports.
      model: takes the place of `config.model` and `config.adapters`, and of those of runs that this one starts from if theirs are equal.
      make_iterator: takes the place of `moejax.data.make_iterator`; given shard_index and shard_count if there are several
        processes. What it gives is known by its first batch when a run goes on, and not at all when a finished one is read.
      info: takes the place of `moejax.data.info(config.data)`.
      resolve: trains the runs that this one starts from, and gives their folders; by default they are trained below `workdir`, in
        `starts/`.

    Raises:
      ConfigError: the config is wrong, its sizes do not fit the mesh, `workdir` holds another run, or another call is training there.
      NonFiniteLoss: training has diverged; no state from after that step is saved.
      Interrupted: SIGTERM or SIGINT came, to any of the processes; a checkpoint has been saved. A `SystemExit` with code 143
        or 130.
      LostProcess: another process is gone. Nothing more can be saved: all start again from the newest checkpoint.
    """
    started, name, workdir = time.perf_counter(), label or str(workdir), Path(workdir)
    check_value(seed, Seed, "seed")
    progress = progress or (lambda report: None)
    with Signals() as signals, _told(name), contextlib.ExitStack() as stack:
        config = data.with_computed(normalized(config), make_iterator or data.make_iterator)
        resolve = resolve or train_below(workdir / "starts", fit, plain(config), model, make_iterator=make_iterator, info=info)
        given = {"model": model, "info": info if info is None else _context(info)}
        run = stack.enter_context(contextlib.closing(_Run(config, seed, workdir, progress, label, started, given)))
        try:
            finished = run.finished()
            if finished is not None:
                return finished
            run.open(
                model,
                make_iterator or data.make_iterator,
                info if info is not None or make_iterator is not None else data.info(config.data),
                run.beside(resolve, progress),
            )
            signals.defer()
            return run.train(signals)
        except jax.errors.JaxRuntimeError as error:
            if not hosts.lost(error):
                raise
            raise run.abandon(error) from error


@contextlib.contextmanager
def _told(name: str) -> Iterator[None]:
    """Says that a run was stopped before it began; later it says so itself."""
    try:
        yield
    except Interrupted as stop:
        if stop.step is None:
            stop.step = 0
            tell(
                f"{name}: stopped by signal {stop.signum} before its first step; nothing is lost, the same command begins again"
            )
        raise


class _Run:
    """One call of `fit`: the state, the iterator and the open files."""

    def __init__(
        self,
        config: ConfigDict,
        seed: int,
        workdir: Path,
        progress: ProgressCallback,
        label: str,
        started: float,
        given: Mapping[str, Any],
    ):
        self.config, self.plain = config, plain(config)
        self.seed, self.workdir, self.label, self.started = seed, workdir, label, started
        self.training = section(TrainSettings, config, "train")
        self.evaluation = section(EvalSettings, config, "eval")
        self.saving = section(CheckpointSettings, config, "checkpoint")
        # What the numbers depend on beside the config and the seed.
        self._given = {name: described(value) for name, value in given.items() if value is not None}
        self._made_of = files(self.plain)
        self.parallel = make_parallel(config.get("mesh"), section(Exchange, config, "exchange"))
        self._progress = progress if hosts.is_first() else lambda report: None
        self.step = 0
        self._loss: float | None = None
        self._speed: Speed | None = None
        self._logs: dict[str, str] | None = None
        self._earlier_seconds = 0.0
        try:
            workdir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"workdir={workdir} cannot be a folder to train in ({error.strerror}); take another") from None
        with contextlib.ExitStack() as opened:
            if hosts.is_first():
                busy = f"another training is under way in {workdir}; wait for it, or take another workdir"
                opened.enter_context(locked(workdir / "lock", busy))
            self.checkpoints = Checkpoints(workdir / "checkpoints", self.saving.keep, self.saving.asynchronous)
            opened.callback(self.checkpoints.close)
            self._files = opened.pop_all()

    def finished(self) -> RunResult | None:
        """The result of a run that has ended already, or None.

        Raises:
          ConfigError: the folder holds another run.
        """
        step, path = self.checkpoints.newest, self.workdir / RESULT
        if step is None:
            return None
        self._check_same(self.checkpoints.meta(step), step)
        if step != self.training.steps or not hosts.share(path.exists()):
            return None
        if damage := hosts.share(result_damage(self.workdir) if hosts.is_first() else None):
            if hosts.is_first():
                set_aside(path, "result", damage)
            return None
        return read_result(self.workdir, load(self.workdir, step).variables)

    def open(self, model: nn.Module | None, make_iterator: MakeIterator, info: Any, resolve: Resolve) -> None:
        """Data, programs and state, from the newest checkpoint if there is one. A signal ends it where it is: nothing is lost yet."""
        init = parse_init(self.plain.get("init"))
        self._report("data")
        self._make_iterator = make_iterator
        self._shard = (0, 1) if self.parallel is None else batches.data_shard(self.parallel.mesh)
        self.batches = self._iterator(split="train", seed=self.seed)
        self._check_eval_split()
        fresh = self.batches.get_state()
        batch = next(self.batches)
        self._first_batch = batch_contents(batch) if self._shard[1] == 1 else None
        first = batches.global_shapes(_model_inputs(batch), self._shard[1])
        self.batches.set_state(fresh)
        if model is None:
            data.check_covers(self.plain["model"], info, self.plain["data"].get("tokenizer") or "bytes")
        self.program: Program = get_program(self.plain, self.training, first, _context(info), model, self.parallel)
        check_fits(held(self.program.state), self.parallel, "its parameters and optimizer state")
        # What is wrong with this run is said before hours go into the one that it starts from.
        shapes = self.program.state
        frozen, made_of = frozen_models(self.program.task, shapes.frozen, self.seed, resolve, self.label)
        self._made_of |= made_of
        if self.checkpoints.newest != self.training.steps and jax.process_count() == 1:
            self.program.compile_beside(fresh=self.checkpoints.newest is None and "init" not in self.plain)
        self.state: TrainState
        if self.checkpoints.newest is not None:
            self._resume(self.checkpoints.newest)
        elif "init" not in self.plain:
            self.state = self.program.init(jax.random.key(self.seed))
        else:
            self.state = self._start(init, resolve)
        if frozen:
            self.state = self.state.replace(frozen=self.program.place_frozen(frozen))
        if hosts.is_first():
            write_json(self.workdir / "config.json", self.plain, indent=2)
        self.log = (MetricLog if hosts.is_first() else SilentLog)(self.workdir, self.step, self._logs)
        self._files.callback(self.log.close)

    def beside(self, resolve: ResolveRun, progress: ProgressCallback) -> Resolve:
        """Trains the runs that this one starts from where this one is, and tells of it."""
        place = {name: self.plain[name] for name in PLACE if name in self.plain}

        def train(config: Mapping[str, Any], seed: int, label: str) -> Path:
            rest = {name: value for name, value in config.items() if name not in PLACE}
            began = time.perf_counter()
            folder = resolve({**rest, **place}, seed, progress, label)
            self.started += time.perf_counter() - began  # the time of another run
            return folder

        return train

    def train(self, signals: Signals) -> RunResult:
        """Runs to the last step and evaluates."""
        settings = self.training
        train_step, tokens = None, self.program.task.size(self.program.batch)
        if self.step < settings.steps:
            self._report("compile")
            train_step = self.program.train
            check_fits(needed(train_step), self.parallel, f"a step of {tokens:,} tokens")
            self._report("train")
        recent = RecentBatches(settings.log_every)
        # A signal reaches one process; the step at which all of them stop is one that all of them know.
        agree = None if jax.process_count() == 1 else hosts.Agreement(self.parallel.mesh)
        first_step_seconds = None
        if signals.received and agree is None and self.step < settings.steps:
            self._leave(signals.received)  # it came while the step was compiled
        while self.step < settings.steps:
            batch = next(self.batches)
            self.state, metrics = train_step(self.state, self._place(batch))
            self.step += 1
            stop = signals.received or 0
            stop = stop if agree is None else agree(stop)
            recent.add(self.step, np.asarray(batch.get("example_id", ())))
            if first_step_seconds is None:
                jax.block_until_ready(metrics)
                first_step_seconds = time.perf_counter() - self.started
                self._speed = Speed(self.step, time.perf_counter())

            line: Line = {}
            last = self.step == settings.steps
            if last or self._due(settings.log_every):
                self._check_finite(recent)
                line |= self._train_line(metrics, tokens)
            if last or self._due(self.evaluation.every):
                self._check_finite(recent)
                line |= self._evaluate(last)
            if line:
                self.log.write(self.step, numbers(line))
            if last or stop or self._due(self.saving.every):
                self._check_finite(recent)
                self._save()
            if stop and not last:
                self._leave(stop)
        if not settings.steps and self.checkpoints.newest is None:
            self.log.write(0, numbers(self._evaluate(last=True)))
            self._save()
        result = self._result(first_step_seconds or time.perf_counter() - self.started)
        if signals.received:
            self._leave(signals.received)
        return result

    def close(self) -> None:
        self._files.close()

    def abandon(self, error: Exception) -> hosts.LostProcess:
        """Leaves everything as it is: closing would wait for a process that is gone. The error to raise."""
        self._files.pop_all()
        newest = "none" if self.checkpoints.newest is None else self.checkpoints.path(self.checkpoints.newest)
        reason = str(error).splitlines()[0]
        return hosts.LostProcess(
            f"{self.label or self.workdir}: process {jax.process_index()} of {jax.process_count()} has lost another one near step "
            f"{self.step} ({reason}); the newest checkpoint is {newest}: start all processes again to go on from there"
        )

    def _iterator(self, **arguments: Any) -> Any:
        index, count = self._shard
        shards = {"shard_index": index, "shard_count": count} if count > 1 else {}
        return self._make_iterator(self.config.data, **arguments, **shards)

    def _place(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What a step is given."""
        inputs = _model_inputs(batch)
        return inputs if self.parallel is None else batches.to_global(inputs, self.program.batch)

    def _start(self, init: Init, resolve: Resolve) -> TrainState:
        """The state before the first step of a run that starts from others."""
        # Whole batches, the same in every process: each of them makes the whole start.
        data = self.config.data
        batches = lambda count: list(islice(self._make_iterator(data, split="train", seed=self.seed), count))  # noqa: E731
        variables, made_of = starting(init, self.program, self.plain, self.seed, resolve, batches, self.label)
        self._made_of |= made_of
        return self.program.begin(variables, jax.random.key(self.seed))

    def _resume(self, step: int) -> None:
        restored = self.checkpoints.restore(step, self.program.state)
        meta = restored.meta
        self._check_files(meta)  # again: what has been read meanwhile, it has been read as it was
        began = meta.get("first_batch")
        if None not in (began, self._first_batch) and began != self._first_batch:
            raise ConfigError(
                f"{self.workdir} holds a run that began with another batch of data; give it the data that it had, or take another "
                "workdir"
            )
        self._first_batch = began or self._first_batch
        self._made_of = {**meta.get("made_of", {}), **self._made_of}
        self.state, self.step, self._logs = restored.state, step, restored.logs
        if meta["config"]["data"].get("workers", 0) == self.plain["data"].get("workers", 0):
            self.batches.set_state(restored.data_state)
        else:
            # Other workers keep another state of the same batches.
            for _ in range(step):
                next(self.batches)
        self._earlier_seconds = meta.get("seconds", 0.0)

    def _check_same(self, meta: Mapping[str, Any], step: int) -> None:
        """Refuses the checkpoint of another run."""
        if meta["seed"] != self.seed:
            raise ConfigError(
                f"{self.workdir} holds a run with seed={meta['seed']}, not {self.seed}; take another workdir for each seed"
            )
        check_same_run(meta["config"], self.plain, str(self.workdir), step)
        check_equal(meta.get("given", {}), self._given, str(self.workdir), " (given to `fit` by hand)")
        self._check_files(meta)

    def _check_files(self, meta: Mapping[str, Any]) -> None:
        made_of = meta.get("made_of", {})
        for place, contents in self._made_of.items():
            if made_of.get(place, contents) != contents:
                kinds = {"tokenizer": "another file than the one that is", "path": "other data than what is"}
                was = kinds.get(place.rpartition(".")[2], "another checkpoint than the one that is")
                raise ConfigError(
                    f"{self.workdir} holds a run whose {place} was {was} there now; take another workdir, or remove this one to start anew"
                )

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _train_line(self, metrics: Mapping[str, Any], tokens: int) -> Line:
        metrics = dict(jax.device_get(metrics))
        sums = metrics.pop("sums")
        scores = {f"train/{name}": value for name, value in self.program.task.metrics(sums).items()}
        self._loss = scores["train/loss"]
        rate = self._speed.update(self.step, time.perf_counter())
        self.log.write_timing(self.step, {"seconds": self._seconds(), "tokens_per_second": rate * tokens})
        self._report("train", tokens * rate, (self.training.steps - self.step) / rate if rate else None)
        return {**expand(metrics), **scores}

    def _evaluate(self, last: bool) -> Line:
        """Means over the evaluation batches, which are the same for every seed and step; the last time also in blocks of batches."""
        self._report("eval")
        self._speed = self._speed or Speed(self.step, time.perf_counter())
        self._speed.update(self.step, time.perf_counter())
        evaluate = self.program.evaluate
        totals: dict[str, Any] = defaultdict(float)
        stat_totals: dict[str, Any] = defaultdict(float)
        each: list[dict[str, Any]] = []
        for batch in self._eval_batches():
            sums, stats = jax.device_get(evaluate(self.state, self._place(batch)))
            if last:
                each.append(sums)
            # In float64: a float32 sum of a large split would depend on how it is cut into batches.
            for name, value in sums.items():
                totals[name] += np.asarray(value, np.float64)
            for name, value in stats.items():
                stat_totals[name] += np.asarray(value, np.float64)
        if not totals.get("count"):
            raise ConfigError(f"eval.split='{self.evaluation.split}' has no batch with a valid target; take another split")
        stats = expand({name: value / totals["count"] for name, value in stat_totals.items()})
        scores = self.program.task.metrics
        blocks = {f"{name}/blocks": values for name, values in block_values(scores, each).items()}
        line = {**scores(totals), **stats, **blocks}
        self._speed.skip(time.perf_counter())
        return {f"eval/{name}": value for name, value in line.items()}

    def _eval_batches(self) -> Iterator[Mapping[str, Any]]:
        for i, batch in enumerate(self._iterator(split=self.evaluation.split, seed=0, num_epochs=1)):
            if self.evaluation.batches and i == self.evaluation.batches:
                return
            yield batch

    def _check_eval_split(self) -> None:
        """Refuses a split that there is not before anything is trained. What a user's own `make_iterator` has, it alone knows."""
        if self._make_iterator is data.make_iterator:
            try:
                self._iterator(split=self.evaluation.split, seed=0, num_epochs=1)
            except ConfigError as error:
                raise ConfigError(f"{error} (eval.split)") from None

    def _check_finite(self, recent: RecentBatches) -> None:
        bad = int(self.state.first_bad_step)
        if bad >= 0:
            newest = self.checkpoints.newest
            ids = [i for ids in hosts.gather(recent.ids(bad)) for i in ids]
            raise NonFiniteLoss(bad, ids, None if newest is None else self.checkpoints.path(newest))

    def _save(self) -> None:
        self.log.sync()
        meta = {
            "config": self.plain,
            "seed": self.seed,
            "seconds": self._seconds(),
            "made_of": self._made_of,
            "given": self._given,
            "first_batch": self._first_batch,
        }
        self.checkpoints.save(self.step, self.state, self.batches.get_state(), meta, self.log.copies())

    def _leave(self, signum: int) -> None:
        self.close()
        saved = self.checkpoints.newest == self.step
        where = f"checkpoint saved in {self.checkpoints.path(self.step)}; the same command goes on from there"
        line = f"{self.label or self.workdir}: stopped by signal {signum} after step {self.step} of {self.training.steps}; " + (
            where if saved else "the same command begins again"
        )
        if hosts.is_first():
            tell(line)
        raise Interrupted(signum, self.step)

    def _report(self, phase: str, tokens_per_second: float = 0.0, seconds_left: float | None = None) -> None:
        self._progress(Progress(self.label, self.step, self.training.steps, phase, tokens_per_second, self._loss, seconds_left))

    def _seconds(self) -> float:
        return self._earlier_seconds + time.perf_counter() - self.started

    def _result(self, first_step_seconds: float) -> RunResult:
        self.checkpoints.wait()
        hosts.barrier()  # the first process has written the last line
        history = self.log.history()
        final = next(line for line in reversed(history) if any(key.startswith("eval/") for key in line))
        result = RunResult(
            metrics={k: v for k, v in final.items() if k.startswith("eval/") and not isinstance(v, list)},
            history=history,
            steps=self.step,
            seconds=self._seconds(),
            first_step_seconds=first_step_seconds,
            params=self.program.params,
            active_params=self.program.active_params,
            trainable_params=self.program.trainable_params,
            flops_per_step=self.program.flops,
            tokens_per_step=self.program.task.size(self.program.batch),
            state_bytes=self.program.state_bytes,
            variables=self.state.variables,
        )
        if hosts.is_first():
            result.write(self.workdir)
        return result


def _context(info: Any) -> dict[str, Any]:
    """What the data know that tasks ask for."""
    return {"domains": tuple(getattr(info, "domains", ())), "bytes_per_token": getattr(info, "bytes_per_token", 1.0)}


def _model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """All of a batch but the example ids, which are 64 bits wide and stay on the host."""
    return {name: value for name, value in batch.items() if name != "example_id"}
