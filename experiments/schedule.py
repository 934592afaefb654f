"""Which run is trained next, and where: until nothing is wanted any more."""

from collections.abc import Callable, Mapping, Sequence

from ml_collections import ConfigDict

from experiments import tables
from experiments.cache import Cache, Run, run_label
from experiments.pool import Place
from experiments.progress import Board, Line
from experiments.trainer import Job, Trainer
from moejax.core.errors import ConfigError
from moejax.core.text import tell

Name = tuple[str, int]  # arm and seed
Found = Mapping[str, Mapping[int, Run]]  # [arm][seed]
Wanted = Callable[[Found], Sequence[Name]]  # what is to be trained now, of what is there


class RunsFailed(RuntimeError):
    """Runs ended with an error; the others are finished."""


def train_all(
    wanted: Wanted, configs: Mapping[str, ConfigDict], trainer: Trainer, place: Place, board: Board, fresh: bool = False
) -> dict[str, dict[int, Run]]:
    """Has trained all that is `wanted`, until nothing is; returns `[arm][seed]`, arms in the order of `configs`.

    It is asked again whenever a run has ended, so that no worker waits for the last run of a look while another claim has one to
    train. What another process is training is left for last, and then waited for.

    Args:
      fresh: train again what had finished before.

    Raises:
      ConfigError: a run's config cannot be trained, which was found out when it was to be.
      RunsFailed: runs ended with another error, and all others that were wanted have ended.
    """
    return _Schedule(wanted, configs, trainer, place, board, fresh).run()


class _Schedule:
    """The runs of a command: wanted, open, under way, found, failed."""

    def __init__(
        self,
        wanted: Wanted,
        configs: Mapping[str, ConfigDict],
        trainer: Trainer,
        place: Place,
        board: Board,
        fresh: bool,
    ):
        self.wanted, self.configs, self.trainer, self.place, self.board, self.fresh = (
            wanted,
            configs,
            trainer,
            place,
            board,
            fresh,
        )
        self.found: dict[str, dict[int, Run]] = {arm: {} for arm in configs}
        self.lines: dict[Name, Line] = {}
        self.open: list[Name] = []
        self.elsewhere: list[Name] = []
        self.running: dict[int, Job] = {}
        self.failed: list[Name] = []
        self.latest: dict[int, str] = {}  # worker -> the arm whose program it has

    def run(self) -> dict[str, dict[int, Run]]:
        self.ask()
        while self.open or self.elsewhere or self.running:
            self.place.ensure(len(self.open) + len(self.elsewhere) + len(self.running))
            for worker in self.place.idle():
                if (job := self.choose(worker)) is not None:
                    name = job.arm, job.seed
                    self.running[worker], self.latest[worker] = job, job.arm
                    self.place.start(worker, job, self.lines[name])
            self.hear()
        if self.failed:
            names = ", ".join(run_label(*name) for name in self.failed)
            count = f"{len(self.failed)} run{'' if len(self.failed) == 1 else 's'}"
            raise RunsFailed(f"{count} failed, and all others have ended: {names}; the same command tries them again")
        return {arm: dict(sorted(seeds.items())) for arm, seeds in self.found.items()}

    def ask(self) -> None:
        """Opens what is newly wanted, unless it is there already."""
        while new := [name for name in self.wanted(self.found) if name not in self.lines]:
            for arm, seed in new:
                self.lines[arm, seed] = self.board.line(arm, seed, int(self.configs[arm].train.steps))
            for arm, seed in new:
                if self.fresh:
                    Cache(self.trainer.runs).forget(self.configs[arm], seed)
                run = self.trainer.find(self.configs[arm], seed, arm)
                if run is None:
                    self.open.append((arm, seed))
                else:
                    self.end(run)

    def choose(self, worker: int) -> Job | None:
        """The next job of a worker: of the arm whose program it has, or of one that nobody has, or the first one."""
        if not self.open:
            if not self.elsewhere:
                return None
            arm, seed = self.elsewhere.pop(0)
            return Job(arm, seed, self.configs[arm], wait=True)
        mine, taken = self.latest.get(worker), set(self.latest.values())
        chosen = min(self.open, key=lambda name: (name[0] != mine, name[0] in taken) if self.place.divides else ())
        self.open.remove(chosen)
        return Job(*chosen, self.configs[chosen[0]])

    def hear(self) -> None:
        """Takes in one event."""
        worker, kind, value = self.place.next()
        job = self.running[worker]
        name = job.arm, job.seed
        if kind == "progress":
            self.lines[name](value)
            return
        del self.running[worker]
        if kind == "busy":
            self.elsewhere.append(name)
        elif kind == "mistake":
            raise ConfigError(value)
        elif kind == "failed":
            self.failed.append(name)
            self.lines[name].fail()
            tell(f"failed: {run_label(*name)}: {value}")
        else:
            self.end(self.trainer.read(job, value))
            self.ask()

    def end(self, run: Run) -> None:
        self.found[run.arm][run.seed] = run
        self.lines[run.arm, run.seed].finish(tables.ending(run))
