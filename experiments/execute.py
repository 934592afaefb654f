"""Training the arms of a study, or one config, through the cache and under live progress."""

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from rich.console import Console

from experiments import canary, check_matching, docs, environment, record, report, tables
from experiments.baselines import baselines
from experiments.cache import Cache, Run
from experiments.overrides import PLACE
from experiments.pool import Here, Place, Pool
from experiments.progress import Board
from experiments.record import Outcome
from experiments.schedule import Found, Wanted, train_all
from experiments.seeds import next_runs
from experiments.study import Study, resolve
from experiments.terminal import curves, make_console, say, short, show
from experiments.trainer import Trainer
from moejax.core.errors import ConfigError

Fit = Callable[..., Any]
# What a worker needs at least, and how many times as much as a state a step holds, roughly: gradients, activations, the next state.
WORKER_BYTES, STATES = 600e6, 4


def execute(
    study: Study,
    preset: str,
    *,
    runs: Path,
    ablation: str = "",
    arms: Sequence[str] = (),
    seeds: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    fresh: bool = False,
    accept_numerics: bool = False,
    recorded: bool = False,
    jobs: int | None = None,
    fit: Fit | None = None,
    console: Console | None = None,
) -> Outcome:
    """Trains what is not in the cache and returns the outcome.

    Args:
      runs: the cache's directory.
      arms: names of the arms to run; all of the study (and the ablation) if empty.
      seeds: runs of each arm; if None, until every claim is decided or its looks are spent.
      overrides: dotted key -> value, for every arm.
      fresh: train again what is finished.
      accept_numerics: record the canary's numbers, whatever they were.
      recorded: the results are for the repository's ledger, and the canary's numbers too.
      jobs: runs side by side, in processes of one thread each; if None, as many as there are cores and memory for, or in this process
        if it has an accelerator or several devices.
      fit: takes the place of `moejax.train.fit`; the models and the canary are then not checked, and without `jobs` it is called here.

    Raises:
      ConfigError: a name or a config that cannot be used; names and models are checked before anything is trained.
      RunsFailed: runs ended with an error. The others were trained.
    """
    console = console or make_console()
    configs = {arm: resolve(study, preset, arm, overrides) for arm in choose(study, ablation, arms)}

    def wanted(found: Found) -> list[tuple[str, int]]:
        return next_runs(study, preset, list(configs), found, seeds)

    cache = Cache(runs)
    real = fit is None
    first = wanted({})
    cached = any(cache.load(configs[arm], seed, arm) for arm, seed in first)
    trainer = Trainer(runs, fit or _prepared_fit(configs, cache, console))
    untrained = [(arm, seed) for arm, seed in first if fresh or not cache.has(configs[arm], seed)]
    with _place(trainer, jobs, real, [configs[arm] for arm, _ in untrained], console) as place:
        if real and preset in record.LEDGER_PRESETS:
            own = bool(arms or seeds or any(key.split(".")[0] not in PLACE for key in overrides or {}))
            _refuse_unmatched(study, preset, configs, [arm for arm, _ in untrained], own, console)
        # Before training where cached runs will stand beside new ones; afterwards where it only guards the ledger, so that a first
        # run starts at once.
        if real and (cached or accept_numerics):
            _ask_canary(cache, trainer.fit, accept_numerics, recorded, console)
        trained = _train_all(wanted, configs, trainer, place, fresh, console)
    if real and preset in record.LEDGER_PRESETS and not (cached or accept_numerics):
        _ask_canary(cache, trainer.fit, False, recorded, console)
    reached = baselines(next(iter(configs.values())), cache.root) if real and preset in record.LEDGER_PRESETS else {}
    return Outcome(study, preset, ablation, trained, configs, overrides or {}, seeds, reached)


def execute_config(
    name: str,
    config: ConfigDict,
    *,
    runs: Path,
    workdir: Path | None = None,
    seeds: int = 1,
    fresh: bool = False,
    accept_numerics: bool = False,
    recorded: bool = False,
    jobs: int | None = None,
    fit: Fit | None = None,
    console: Console | None = None,
) -> dict[int, Run]:
    """Trains one config with each seed, in the cache or in `workdir` (one folder a seed if there are several). See `execute`."""
    console = console or make_console()
    configs, cache, real = {name: config}, Cache(runs), fit is None

    def wanted(found: Found) -> list[tuple[str, int]]:
        return [(name, seed) for seed in range(seeds) if seed not in found.get(name, {})]

    trainer = Trainer(runs, fit or _prepared_fit(configs, cache, console, False), workdir, apart=seeds > 1)
    untrained = [seed for seed in range(seeds) if fresh or workdir or not cache.has(config, seed)]
    with _place(trainer, jobs, real, [config] * len(untrained), console) as place:
        if real and (accept_numerics or any(cache.load(config, seed, name) for _, seed in wanted({}))):
            _ask_canary(cache, trainer.fit, accept_numerics, recorded, console)
        return _train_all(wanted, configs, trainer, place, fresh, console)[name]


def finished(study: Study, preset: str, ablation: str, runs: Path) -> Outcome | None:
    """The outcome of what is in the cache already; None if no arm of this study (or of this ablation) is.

    It takes the seeds that `execute` would take, as far as they are there.
    """
    cache = Cache(runs)
    configs = {arm.name: resolve(study, preset, arm.name) for arm in study.group(ablation)}
    found: dict[str, dict[int, Run]] = {arm: {} for arm in configs}
    while todo := next_runs(study, preset, list(configs), found):
        loaded = {(arm, seed): run for arm, seed in todo if (run := cache.load(configs[arm], seed, arm))}
        for (arm, seed), run in loaded.items():
            found[arm][seed] = run
        if len(loaded) < len(todo):
            break
    found = {arm: seeds for arm, seeds in found.items() if seeds}
    wanted = study.ablations[ablation] if ablation else study.arms
    if not any(arm.name in found for arm in wanted):
        return None
    reached = baselines(next(iter(configs.values())), cache.root, known=True)
    return Outcome(study, preset, ablation, found, configs, baselines=reached)


def finish(outcome: Outcome, runs: Path, ledger: Path, console: Console) -> int:
    """Prints the tables, writes everything and says where; the exit status is 1 if a smoke run diverged."""
    console.print()
    show(console, tables.arms(outcome))
    if outcome.verdicts:
        show(console, tables.claims(outcome))
    for claim in outcome.unjudged:
        absent = ", ".join(arm for arm in claim.arms if arm not in outcome.runs)
        say(console, f"not judged: {claim.sentence} (needs {absent})")
    diverged = [(arm, run) for arm, group in outcome.runs.items() for run in group.values() if run.diverged]
    for arm, run in diverged:
        say(console, f"diverged: {arm} seed {run.seed}: {run.diverged}")
    written = report.write(outcome, runs)
    paths = [*written.plots, written.results, written.html]
    if not outcome.missing:
        entry = record.write_entry(outcome, ledger)
        paths.append(entry)
        # A ranking of many arms is looked at, not read: it stands beside its numbers.
        ranking = [plot for plot in written.plots if plot.stem == "ranking" and not outcome.ablation]
        paths += [Path(shutil.copy(plot, entry.with_suffix(".png"))) for plot in ranking]
        docs.renew(ledger)
    say(console, "wrote")
    for path in paths:
        say(console, f"  {short(path)}")
    if outcome.missing:
        say(console, f"no ledger entry: {outcome.missing}")
    if command := curves(written.tensorboard):
        say(console, f"curves of every run: {command}")
    return 1 if outcome.preset == "smoke" and diverged else 0


def choose(study: Study, ablation: str, arms: Sequence[str]) -> list[str]:
    """Names of the arms to run, in the study's order; all of them if `arms` is empty.

    Raises:
      ConfigError: an unknown arm or ablation, or an arm of an ablation that is not asked for.
    """
    names = [arm.name for arm in study.group(ablation)]
    for name in arms:
        study.arm(name)
        if name not in names:
            home = next(group for group, found in study.ablations.items() if name in {arm.name for arm in found})
            raise ConfigError(f"arm '{name}' belongs to ablation '{home}' of study '{study.slug}'; add --ablation={home}")
    return [name for name in names if not arms or name in arms]


def _prepared_fit(configs: Mapping[str, ConfigDict], cache: Cache, console: Console, arms: bool = True) -> Fit:
    """`moejax.train.fit`, after building everything once: what is wrong is found now and not after the first arms. Shows what adapters
    sit around. `arms`: the configs are those of a study's arms, which errors name."""
    import jax

    from moejax.aot.ahead import program_of
    from moejax.train import fit
    from moejax.train.checks import check_config

    for arm, config in configs.items():
        try:
            check_config(config)
            if config.get("adapters"):
                show(console, tables.adapted(arm, program_of(config).adapted_layers))
        except ConfigError as error:
            raise ConfigError(f"{error} (arm '{arm}')" if arms else str(error)) from None
    if jax.default_backend() == "cpu":
        environment.keep_freed_memory()
    if jax.config.jax_compilation_cache_dir is None:
        # Compiling is most of a small run's time, and the same programs come again: further presets, --fresh, resumption.
        jax.config.update("jax_compilation_cache_dir", str(cache.root.absolute() / "compiled"))
    return fit


def _refuse_unmatched(
    study: Study, preset: str, configs: Mapping[str, ConfigDict], untrained: Sequence[str], own: bool, console: Console
) -> None:
    """Stops before hours go into arms that a claim cannot compare.

    Of an experiment of the user's `own` (arms, seeds or values chosen on the command line), and away from the preset and the machine that
    studies are matched at, it only says which claims will not be judged: other backends execute other slots.
    """
    import jax

    concerned = [claim for claim in study.claims if set(claim.arms) & set(untrained)]
    found = [f"{claim.sentence}: {reason}" for claim, reason in check_matching.unjudgeable(concerned, preset, configs)]
    if own or preset != "cpu" or jax.default_backend() != "cpu":
        for line in found:
            say(console, f"will not be judged: {line}")
    elif found:
        raise ConfigError(
            f"study '{study.slug}' has claims that its arms at preset '{preset}' do not allow to judge, so nothing is trained: "
            f"{'; '.join(found)}. Mend the arms, or name in matched= what they do have equally; with --arms, --seeds or "
            "--config.KEY=VALUE arms are trained all the same"
        )


def _ask_canary(cache: Cache, fit: Fit, accept: bool, recorded: bool, console: Console) -> None:
    """Stops if the library's numbers are not those that cached runs and ledger entries were made with.

    The canary sings for one process. Where there are several, numbers on the mesh are compared by the tests.
    """
    import jax

    if jax.process_count() > 1:
        say(console, "several processes: the canary is not asked")
        return
    own, shipped = record.ledger_folder(cache.root, recorded) / "canary.json", record.LEDGER / "canary.json"
    canary.check(cache.root, own, fit, accept, lambda text: say(console, text), shipped)


@contextlib.contextmanager
def _place(trainer: Trainer, jobs: int | None, real: bool, configs: Sequence[ConfigDict], console: Console) -> Iterator[Place]:
    """Where runs of `configs` are trained. Workers start at once, and are ready when all is checked.

    Raises:
      ConfigError: jobs side by side, where one run has the machine for itself.
    """
    import jax

    together = jax.process_count() > 1
    alone = {
        "several processes train each run together": together,
        "each run has the accelerator for itself": jax.default_backend() != "cpu",
        "each run has all devices of this process": jax.device_count() > 1,
    }
    reason = next((reason for reason, applies in alone.items() if applies), "")
    if (not real and jobs is None) or (real and reason):
        if (jobs or 1) > 1:
            raise ConfigError(f"--jobs={jobs} runs side by side cannot be, since {reason}; leave it out")
        yield Here(trainer, together)
        return
    environment_of_workers = {"JAX_PLATFORMS": "cpu"}
    if jax.config.jax_compilation_cache_dir:
        environment_of_workers["JAX_COMPILATION_CACHE_DIR"] = jax.config.jax_compilation_cache_dir
    with Pool(trainer, jobs or environment.cores(), environment_of_workers) as pool:
        pool.ensure(min(1, len(configs)))
        if jobs is None and len(configs) > 1:
            pool.most = min(pool.most, _room(configs[0], console))
        pool.ensure(len(configs))
        yield pool


def _room(config: ConfigDict, console: Console) -> int:
    """How many runs such as that of `config` there is memory for."""
    from moejax.aot.ahead import program_of

    each, free = WORKER_BYTES + STATES * program_of(config).state_bytes, environment.free_memory()
    room = max(int(min(free / each, 1e6)), 1)
    if room < environment.cores():
        say(
            console,
            f"memory for {room} runs at a time: {free / 1e9:.1f} GB, and about {each / 1e9:.1f} GB each (--jobs=N takes N)",
        )
    return room


def _train_all(
    wanted: Wanted, configs: Mapping[str, ConfigDict], trainer: Trainer, place: Place, fresh: bool, console: Console
) -> dict[str, dict[int, Run]]:
    with Board(console, max(map(len, configs))) as board, place.signals():
        return train_all(wanted, configs, trainer, place, board, fresh)
