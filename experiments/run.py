"""The command: trains a study's arms, judges its claims, and writes tables, plots, a report and the ledger.

    python -m experiments.run --study=switch --preset=cpu

See `--help` for the flags and examples. Nothing heavy is imported before a command line is known to be right.
"""

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments import flags
from experiments.flags import Options
from experiments.terminal import curves, make_console, one_line_each, say, short, show, told, trouble
from moejax.core.errors import ConfigError, nearest
from moejax.core.text import tell


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit status. A mistake in it is one line on stderr and status 2, a full disk one and status 1."""
    with one_line_each():
        try:
            options = flags.parse(sys.argv[1:] if argv is None else argv)
            if options.compile_for or options.mode not in TRAINS:
                run = _run_compile if options.compile_for else _MODES[options.mode]
                return run(options, make_console())
            return _train(options)
        except ConfigError as error:
            tell(f"error: {told(error)}")
            return 2
        except KeyboardInterrupt:
            tell("interrupted; the same command goes on from what is finished")
            return 130
        except Exception as error:
            if not (reason := trouble(error)) or os.environ.get("MOEJAX_TRACEBACK"):
                raise
            tell(f"error: {reason}; the same command goes on from what is finished (MOEJAX_TRACEBACK=1 shows where)")
            return 1


def _train(options: Options) -> int:
    """Runs a study or a config, in this process alone or together with others; of several, the first one talks."""
    if options.mode == "study":
        from experiments import study as studies

        studies.load(options.study or flags.DEFAULT_STUDY)  # a wrong name is told before anything heavy is imported

    from moejax.parallel import hosts

    if options.devices is not None:
        hosts.simulate(options.devices)
    try:
        together = hosts.start(options.coordinator or None, options.processes, options.process) > 1
    except TimeoutError as error:
        tell(f"error: {told(error)}")
        return 1
    from experiments.schedule import RunsFailed

    try:
        return _MODES[options.mode](options, make_console(quiet=together and not hosts.is_first()))
    except RunsFailed as error:
        tell(f"error: {told(error)}")
        return 1
    except hosts.LostProcess as error:
        tell(f"error: {told(error)}")
        # Python's own way out would wait for the process that is gone.
        os._exit(LOST)


def _run_study(options: Options, console: Console) -> int:
    """Trains, judges and reports one study."""
    from experiments import study as studies

    study = studies.load(options.study or flags.DEFAULT_STUDY)
    preset = options.preset or flags.DEFAULT_PRESET
    ablation = options.ablation

    from experiments.claims import claimed
    from experiments.execute import choose, execute, finish
    from experiments.record import ledger_folder
    from moejax.parallel import hosts

    first = choose(study, ablation, options.arms)[0]
    runs = _runs_folder(options)
    ledger = ledger_folder(runs, options.record)
    outcome = execute(
        study,
        preset,
        runs=runs,
        ablation=ablation,
        arms=options.arms,
        seeds=options.seeds,
        overrides=_overrides(studies.resolve(study, preset, first), options),
        fresh=options.fresh,
        accept_numerics=options.accept_numerics,
        recorded=options.record,
        jobs=options.jobs,
        console=console,
    )
    if not hosts.is_first():
        return 0
    # Of several commands on one folder, one after the other.
    with claimed(runs / "reports.claim", "another process writes reports", lambda: None):
        if options.analyse:
            from experiments.analyse import analyse

            analyse(outcome, runs, console)
        return finish(outcome, runs, ledger, console)


def _run_config(options: Options, console: Console) -> int:
    """Trains one config, with each seed, and prints a summary."""
    ((name, config),) = configs_of(options).items()

    from experiments import tables
    from experiments.execute import execute_config

    found = execute_config(
        name,
        config,
        runs=_runs_folder(options),
        workdir=Path(options.workdir) if options.workdir else None,
        seeds=options.seeds or 1,
        fresh=options.fresh,
        accept_numerics=options.accept_numerics,
        recorded=options.record,
        jobs=options.jobs,
        console=console,
    )
    console.print()
    show(console, tables.summary_of(name, found))
    for seed, run in found.items():
        say(console, f"seed {seed}: {short(run.path)}" + (f"  diverged: {run.diverged}" if run.diverged else ""))
    if command := curves(found[0].path):
        say(console, f"curves: {command}")
    return 0


def _run_compile(options: Options, console: Console) -> int:
    """Compiles one config, or each arm of a study, for devices that need not be there, and shows what it needs."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # looking for an accelerator takes a while, and none is needed
    from experiments import pods

    pods.compile_configs(configs_of(options), options.compile_for, _runs_folder(options) / "pods", console)
    return 0


def configs_of(options: Options) -> dict[str, Any]:
    """What a command is about: its one config, or `study.preset.arm` -> config of each arm of its study.

    Raises:
      ConfigError: a file, name, key or value that is wrong.
    """
    if options.config:
        from experiments import overrides

        name, config = flags.load_config(options.config)
        overrides.apply(config, overrides.shortened(config, _overrides(config, options)), "the command line")
        return {name: config}

    from experiments import study as studies

    study, preset = studies.load(options.study or flags.DEFAULT_STUDY), options.preset or flags.DEFAULT_PRESET

    from experiments.execute import choose

    found = {}
    for arm in choose(study, options.ablation, options.arms):
        extra = _overrides(studies.resolve(study, preset, arm), options)
        found[f"{study.slug}.{preset}.{arm}"] = studies.resolve(study, preset, arm, extra)
    return found


def _run_list(options: Options, console: Console) -> int:
    """The catalogue, one study in detail, or the matrix of what methods can do."""
    if options.matrix:
        return _run_matrix(options, console)

    from experiments import tables

    if options.study:
        from experiments import study as studies

        study = studies.load(options.study)
        say(console, f"{study.title}  arXiv {study.arxiv}\n")
        for table in tables.describe(study):
            show(console, table)
        return 0

    from experiments import catalog, record

    rows, entries = catalog.load(), record.entries()
    if options.family and options.family not in catalog.families(rows):
        raise ConfigError(f"unknown family '{options.family}'{nearest(options.family, catalog.families(rows))}")
    show(console, tables.methods([row for row in rows.values() if options.family in ("", row.family)], entries))
    if not options.family:
        for slug, path in catalog.extra_studies(rows).items():
            verdicts = tables.count_verdicts([entry for entry in entries if entry["slug"] == slug])
            say(console, f"study beside the papers: {slug} (experiments/{path.parent.name}/{path.name})  {verdicts}".rstrip())
    say(console, f"{catalog.count(rows)}; run a study with --study=NAME, see it with --list --study=NAME")
    return 0


def _run_matrix(options: Options, console: Console) -> int:
    """Tries every method of the catalogue that has a study (or one study, or a family)."""
    from experiments import catalog
    from experiments import study as studies

    rows = catalog.load()
    if options.family and options.family not in catalog.families(rows):
        raise ConfigError(f"unknown family '{options.family}'{nearest(options.family, catalog.families(rows))}")
    slugs = [row.slug for row in rows.values() if row.study and options.family in ("", row.family)]
    found = [studies.load(slug) for slug in ([options.study] if options.study else slugs)]

    from moejax.parallel import hosts

    os.environ["JAX_PLATFORMS"] = "cpu"
    # Many small programs, each run once: the time goes into compiling.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
    hosts.simulate(8)

    from experiments import matrix

    cells = matrix.matrix(found, lambda slug: say(console, f"trying {slug}"))
    console.print()
    show(console, matrix.table(cells))
    for slug, row in cells.items():
        for reason in matrix.reasons(row):
            say(console, f"{slug}, {reason}")
    return 0


def _run_report(options: Options, console: Console) -> int:
    """Rebuilds the reports of all that is finished, and the index; trains nothing and leaves the ledger alone."""
    from experiments import record, report
    from experiments import study as studies
    from experiments.execute import finished

    runs, found = _runs_folder(options), 0
    if not options.study and (options.preset or options.ablation):
        raise ConfigError("--preset and --ablation choose within one study; add --study=NAME to --report")
    for slug in [options.study] if options.study else sorted(studies.study_files()):
        study = studies.load(slug)
        presets = {options.preset: study.preset(options.preset)} if options.preset else study.presets
        study.group(options.ablation)
        for preset in presets:
            for ablation in [options.ablation] if options.ablation else ["", *study.ablations]:
                outcome = finished(study, preset, ablation, runs)
                if outcome:
                    found += 1
                    say(console, f"wrote {short(report.write(outcome, runs).html)}")
    if not found:
        say(console, f"no finished runs of {options.study or 'any study'} under {short(runs)}")
    say(console, f"wrote {short(report.write_index((record.LEDGER, record.ledger_folder(runs)), runs))}")
    return 0


def _overrides(config: Any, options: Options) -> dict[str, Any]:
    from experiments import overrides

    return {key: overrides.parse(config, key, text, "the command line") for key, text in options.overrides.items()}


def _runs_folder(options: Options) -> Path:
    """Where runs are cached: a folder that can be written, which is found out before anything is trained.

    Runs are claimed, renamed and appended to as files are, which a bucket knows nothing of: it has to be mounted.
    """
    name = "--runs" if options.runs else "MOEJAX_RUNS" if os.environ.get("MOEJAX_RUNS") else "the folder of runs"
    runs = options.runs or os.environ.get("MOEJAX_RUNS") or "runs"
    for flag, place in ((name, runs), ("--workdir", options.workdir)):
        if "://" in place:
            raise ConfigError(
                f"{flag}={place} is a bucket; mount it and give the path, or let python -m experiments.launch --sky=... mount it"
            )
    runs = Path(runs)
    if not options.workdir:
        try:
            runs.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=runs):
                pass
        except OSError as error:
            raise ConfigError(f"{name}={runs} cannot be written in ({error.strerror}); give another with --runs=DIR") from None
    return runs


TRAINS = ("study", "config")
LOST = 75  # the exit status that asks to be started again (EX_TEMPFAIL)
_MODES: dict[str, Callable[[Options, Console], int]] = {
    "study": _run_study,
    "config": _run_config,
    "list": _run_list,
    "report": _run_report,
}


def _leave(status: int | str | None) -> None:
    """Ends the process. After a signal at once: Python's own way out would wait for threads that still read data."""
    together = "jax" in sys.modules and sys.modules["jax"].process_count() > 1
    if status not in (130, 143) or together:
        sys.exit(status)
    for child in multiprocessing.active_children():
        child.terminate()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(status))


if __name__ == "__main__":
    try:
        code: int | str | None = main()
    except SystemExit as stop:
        code = stop.code
    _leave(code)
