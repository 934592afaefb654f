"""The command line of `experiments.run`, checked as a whole before anything heavy is imported."""

import argparse
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from moejax.core.errors import ConfigError, nearest

DEFAULT_STUDY = "first_mixture"
DEFAULT_PRESET = "cpu"

# Flag -> the modes in which it means something.
MODES = {
    "study": ("study", "list", "report", "compile_for"),
    "preset": ("study", "report", "compile_for"),
    "ablation": ("study", "report", "compile_for"),
    "arms": ("study", "compile_for"),
    "seeds": ("study", "config"),
    "analyse": ("study",),
    "record": ("study", "config"),
    "fresh": ("study", "config"),
    "jobs": ("study", "config"),
    "accept_numerics": ("study", "config"),
    "overrides": ("study", "config", "compile_for"),
    "family": ("list",),
    "matrix": ("list",),
    "workdir": ("config",),
    "runs": ("study", "config", "report", "compile_for"),
    "compile_for": ("study", "config"),
    "devices": ("study", "config"),
    "coordinator": ("study", "config"),
    "processes": ("study", "config"),
    "process": ("study", "config"),
}

EPILOG = """examples:
  python -m experiments.run                                   the default study at its CPU scale
  python -m experiments.run --list --family=token-choice      methods and what exists of them
  python -m experiments.run --list --matrix --study=switch     backends, devices, causality, decoding: by trying
  python -m experiments.run --study=switch --preset=smoke     one study, a few steps
  python -m experiments.run --study=switch --ablation=capacity
  python -m experiments.run --study=switch --record           into the repository's ledger and docs
  python -m experiments.run --study=switch --jobs=4           four runs side by side
  python -m experiments.run --study=switch --analyse          what its routers learnt
  python -m experiments.run --config=configs/base_lm.py --config.train.steps=50
  python -m experiments.run --config=configs/base_lm.py --config.mesh='data=2,expert=4' --devices=8
  python -m experiments.run --config=configs/pods/mixtral_8x7b.py --compile_for=v5e:16x16
  python -m experiments.run --report                          rebuild reports and index from finished runs
"""


@dataclass(frozen=True)
class Options:
    """A checked command line. Empty strings and None mean: not given."""

    mode: str
    study: str = ""
    preset: str = ""
    ablation: str = ""
    arms: tuple[str, ...] = ()
    seeds: int | None = None
    config: str = ""
    overrides: dict[str, str] = field(default_factory=dict)
    family: str = ""
    matrix: bool = False
    analyse: bool = False
    compile_for: str = ""
    runs: str = ""
    workdir: str = ""
    record: bool = False
    fresh: bool = False
    accept_numerics: bool = False
    jobs: int | None = None
    devices: int | None = None
    coordinator: str = ""
    processes: int | None = None
    process: int | None = None


def parse(argv: Sequence[str], also: Collection[str] = ()) -> Options:
    """The options in `argv`; `also` are further flags that the caller knows, for hints.

    Raises:
      ConfigError: an unknown flag, a value of the wrong type, or flags that do not go together.
    """
    rest, overrides = _take_overrides(argv)
    parser = _parser()
    given, unknown = parser.parse_known_args(rest)
    if unknown:
        names = [*(action.option_strings[-1] for action in parser._actions if action.option_strings), *also]
        raise ConfigError(f"unknown argument '{unknown[0]}'{nearest(unknown[0].split('=')[0], names)}")
    values: dict[str, Any] = {**vars(given), "overrides": overrides}
    wanted = [name for name in ("list", "report", "config") if values[name]]
    if len(wanted) > 1:
        raise ConfigError(f"--{wanted[0]} does not go with --{wanted[1]}; give one of them")
    mode = wanted[0] if wanted else "study"
    for name, modes in MODES.items():
        for other in (mode, "compile_for") if values["compile_for"] and name != "compile_for" else (mode,):
            if values[name] and other not in modes:
                raise ConfigError(f"{_flag(name, values[name])} does not go with --{other}; it belongs to {_owners(modes)}")
    if values["workdir"] and values["fresh"]:
        raise ConfigError(f"--fresh does not go with --workdir={values['workdir']}; remove that folder or choose another")
    if values["workdir"] and values["runs"]:
        raise ConfigError(f"--runs={values['runs']} does not go with --workdir={values['workdir']}; give one of them")
    for name, what in {"seeds": "runs", "jobs": "runs side by side", "devices": "devices"}.items():
        if values[name] is not None and values[name] < 1:
            raise ConfigError(f"--{name}={values[name]} is not a number of {what}; give 1 or more")
    if values["jobs"] is not None:
        for name in ("devices", "coordinator", "processes", "process"):
            if values[name] not in (None, ""):
                raise ConfigError(
                    f"--jobs={values['jobs']} does not go with --{name}={values[name]}, with which each run has all devices"
                )
    arms = tuple(name.strip() for name in values["arms"].split(",") if name.strip())
    values |= {"arms": arms, "mode": mode}
    return Options(**{name: values[name] for name in Options.__dataclass_fields__})


def load_config(place: str) -> tuple[str, Any]:
    """Name and config of `--config=FILE.py` or `FILE.py:ARG`, which is passed to the file's `get_config`.

    Raises:
      ConfigError: there is no such file, or it has no `get_config` that gives a ConfigDict.
    """
    import runpy

    from ml_collections import ConfigDict

    from experiments import overrides

    file, _, argument = place.partition(":")
    path = Path(file)
    if not path.is_file() or path.suffix != ".py":
        folder = path if path.is_dir() else path.parent
        siblings = [p.as_posix() for p in folder.glob("*.py") if p.stem not in ("__init__", "setup")]
        what = "is a folder, and no config" if path.is_dir() else "is no Python file" if path.exists() else "does not exist"
        raise ConfigError(f"--config={place}: '{file}' {what}{nearest(file, siblings or ['configs/base_lm.py'])}")
    try:
        get_config = runpy.run_path(file).get("get_config")
    except SyntaxError as error:
        raise ConfigError(f"--config={place}: {error.msg} in line {error.lineno} of '{file}'") from None
    if get_config is None:
        raise ConfigError(f"--config={place}: '{file}' defines no get_config()")
    config = get_config(argument) if argument else get_config()
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"--config={place}: get_config() gave {type(config).__name__}, not a ConfigDict")
    return path.stem, overrides.copy(config)


class Parser(argparse.ArgumentParser):
    """One whose errors are of the kind that the command prints in one line."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.replace("argument ", "", 1))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m experiments.run",
        description="Runs a study: trains its arms, judges its claims and writes tables, plots, a report and the ledger.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--study", default="", metavar="NAME", help=f"study to run (default {DEFAULT_STUDY})")
    add("--preset", default="", metavar="smoke|cpu|paper", help=f"its scale (default {DEFAULT_PRESET})")
    add("--ablation", default="", metavar="NAME", help="also run this group of arms")
    add("--arms", default="", metavar="A,B", help="run these arms only (no ledger entry)")
    add(
        "--seeds",
        type=int,
        default=None,
        metavar="N",
        help="runs of each arm (no ledger entry; without it, until claims are decided)",
    )
    add("--config", default="", metavar="FILE.py[:ARG]", help="train one config instead of a study")
    add("--compile_for", default="", metavar="CHIP:SLICE", help="compile, do not train: v5e:16x16, v5p:4x4x8, cpu:8 ...")
    add("--list", action="store_true", help="print the catalogue; with --study, one study in detail")
    add("--family", default="", metavar="NAME", help="with --list: methods of this family")
    add("--matrix", action="store_true", help="with --list: what each method can do, found out by doing it (minutes)")
    add("--analyse", action="store_true", help="also look at what the routers learnt, from the checkpoints of finished runs")
    add("--report", action="store_true", help="rebuild reports and index from finished runs")
    add("--runs", default="", metavar="DIR", help="where runs are cached (default $MOEJAX_RUNS or runs/)")
    add("--record", action="store_true", help="write the repository's ledger and docs, and not DIR/ledger")
    add("--workdir", default="", metavar="DIR", help="with --config: train here instead of in the cache")
    add("--fresh", action="store_true", help="train again what is finished")
    add("--accept_numerics", action="store_true", help="record the canary's new numbers")
    add(
        "--jobs", type=int, default=None, metavar="N", help="runs side by side, on a thread each (default: one a core, on CPUs)"
    )
    add("--devices", type=int, default=None, metavar="N", help="simulate N devices on the CPU (with --config.mesh)")
    add("--coordinator", default="", metavar="HOST:PORT|auto", help="process 0 of several ($MOEJAX_COORDINATOR)")
    add("--processes", type=int, default=None, metavar="N", help="how many they are ($MOEJAX_PROCESSES)")
    add("--process", type=int, default=None, metavar="I", help="which of them this one is ($MOEJAX_PROCESS)")
    # Shown in the help; taken out of the command line by `_take_overrides`.
    add("--config.KEY", default=None, metavar="VALUE", help="override a config value, in every arm: --config.train.steps=50")
    return parser


def _take_overrides(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    rest, overrides = [], {}
    for item in argv:
        if not item.startswith("--config."):
            rest.append(item)
            continue
        key, equals, value = item.removeprefix("--config.").partition("=")
        if not equals or not key:
            raise ConfigError(f"'{item}' has no value; write --config.{key or 'KEY'}=VALUE")
        overrides[key] = value
    return rest, overrides


def _flag(name: str, value: Any) -> str:
    match name, value:
        case "overrides", dict():
            key, text = next(iter(value.items()))
            return f"--config.{key}={text}"
        case _, True:
            return f"--{name}"
    return f"--{name}={value}"


def _owners(modes: tuple[str, ...]) -> str:
    return " or ".join(f"--{mode}" for mode in modes)
