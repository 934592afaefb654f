"""Training the arms of a study, or one config, through the cache and under live progress."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from rich.console import Console

from experiments import canary, docs, environment, matching, record, report, tables
from experiments.cache import Cache, Run, train_in
from experiments.overrides import PLACE
from experiments.progress import Board, Line
from experiments.record import Outcome
from experiments.seeds import next_runs
from experiments.study import Study, resolve
from experiments.terminal import curves, make_console, say, short, show
from moejax.core.errors import ConfigError

Fit = Callable[..., Any]
Found = Mapping[str, Mapping[int, Run]]  # [arm][seed]
Wanted = Callable[[Found], list[tuple[str, int]]]  # what is to be trained next, of what is there


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
      fit: takes the place of `moejax.train.fit`; the models and the canary are then not checked.

    Raises:
      ConfigError: a name or a config that cannot be used; names and models are checked before anything is trained.
    """
    console = console or make_console()
    configs = {arm: resolve(study, preset, arm, overrides) for arm in choose(study, ablation, arms)}

    def wanted(found: Found) -> list[tuple[str, int]]:
        return next_runs(study, preset, list(configs), found, seeds)

    cache = Cache(runs)
    real = fit is None
    first = wanted({})
    cached = any(cache.load(configs[arm], seed, arm) for arm, seed in first)
    fit = fit or _prepared_fit(configs, cache, console)
    if real and preset in record.LEDGER_PRESETS:
        untrained = [arm for arm, seed in first if not cache.has(configs[arm], seed)]
        own = bool(arms or seeds or any(key.split(".")[0] not in PLACE for key in overrides or {}))
        _refuse_unmatched(study, preset, configs, untrained, own, console)
    # Before training where cached runs will stand beside new ones; afterwards where it only guards the ledger, so that a first
    # run starts at once.
    if real and (cached or accept_numerics):
        _ask_canary(cache, fit, accept_numerics, recorded, console)
    trained = _train_all(wanted, configs, cache, fit, fresh, console)
    if real and preset in record.LEDGER_PRESETS and not (cached or accept_numerics):
        _ask_canary(cache, fit, False, recorded, console)
    return Outcome(study, preset, ablation, trained, configs, overrides or {}, seeds)


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
    fit: Fit | None = None,
    console: Console | None = None,
) -> dict[int, Run]:
    """Trains one config with each seed, in the cache or in `workdir` (one folder a seed if there are several)."""
    console = console or make_console()
    configs, cache = {name: config}, Cache(runs)

    def wanted(found: Found) -> list[tuple[str, int]]:
        return [(name, seed) for seed in range(seeds) if seed not in found.get(name, {})]

    if fit is None:
        fit = _prepared_fit(configs, cache, console, False)
        if accept_numerics or any(cache.load(config, seed, name) for _, seed in wanted({})):
            _ask_canary(cache, fit, accept_numerics, recorded, console)
    if workdir is None:
        return _train_all(wanted, configs, cache, fit, fresh, console)[name]

    def train(arm: str, seed: int, line: Line) -> Run:
        folder = workdir / f"seed{seed}" if seeds > 1 else workdir
        return train_in(folder, config, seed, arm, fit, line, cache.starts(fit))

    return _with_board(wanted, configs, train, console)[name]


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
    return Outcome(study, preset, ablation, found, configs) if any(arm.name in found for arm in wanted) else None


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
    found = [f"{claim.sentence}: {reason}" for claim, reason in matching.unjudgeable(concerned, preset, configs)]
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


def _train_all(
    wanted: Wanted, configs: Mapping[str, ConfigDict], cache: Cache, fit: Fit, fresh: bool, console: Console
) -> dict[str, dict[int, Run]]:
    from moejax.parallel import hosts

    def train(arm: str, seed: int, line: Line) -> Run:
        found = cache.load(configs[arm], seed, arm) if hosts.share(cache.has(configs[arm], seed)) else None
        return found or cache.train(configs[arm], seed, arm, fit, line)

    def fresher(found: Found) -> list[tuple[str, int]]:
        todo = wanted(found)
        for arm, seed in todo if fresh else ():
            cache.forget(configs[arm], seed)
        return todo

    return _with_board(fresher, configs, train, console)


def _with_board(
    wanted: Wanted, configs: Mapping[str, ConfigDict], train: Callable[[str, int, Line], Run], console: Console
) -> dict[str, dict[int, Run]]:
    """Runs `train(arm, seed, line)` for all that is `wanted`, until nothing is; returns `[arm][seed]`, arms in the order of `configs`."""
    found: dict[str, dict[int, Run]] = {arm: {} for arm in configs}
    with Board(console, max(map(len, configs))) as board:
        while todo := wanted(found):
            lines = {(arm, seed): board.line(arm, seed, int(configs[arm].train.steps)) for arm, seed in todo}
            for arm, seed in todo:
                found[arm][seed] = train(arm, seed, lines[arm, seed])
                lines[arm, seed].finish(tables.ending(found[arm][seed]))
    return found
