"""A command of `experiments.run` as a job on other machines: a task of SkyPilot, or a Slurm script.

    python -m experiments.launch --sky=tpu-v5litepod-256 --spot --config=configs/pods/vmoe_l16.py --runs=gs://bucket/runs
    python -m experiments.launch --slurm --nodes=4 --config=configs/pods/vmoe_l16.py --runs=/shared/runs
    python -m experiments.launch --slurm --array=8 --gpus_per_node=1 --study=switch --runs=/shared/runs    # eight share its runs
    python -m experiments.launch ... --dry_run      # prints what would be submitted, and how

What is not a flag of the launcher goes to `experiments.run` and is checked as there before anything is submitted. `--runs` (or
`--workdir`) is a bucket, which the task mounts, or a folder that all machines see: a job that is started again goes on from the
newest checkpoint there.

SkyPilot (`pip install 'moejax[launch]'`) finds the machines, in a dozen clouds, on Kubernetes or on Slurm, sends them this checkout,
and starts the job again elsewhere when they are preempted. The Slurm script is for clusters without it, on which this checkout and its
Python lie where all nodes see them; it requeues itself. Neither starts a job again that has failed by itself.
"""

import argparse
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments import flags, run
from experiments.environment import REPOSITORY
from experiments.flags import Options
from experiments.jobs import BUCKET, batch_script, mount, task_file
from experiments.terminal import short, told
from moejax.core.errors import ConfigError
from moejax.core.text import tell

MISTAKE = 2  # exit status of a wrong command line
WRITTEN = REPOSITORY / "runs" / "launch"  # task files and scripts; git ignores it
# Keys of configs that hold a path, and what is none.
PATHS = ("tokenizer", "data_dir", "path")
NO_PATH = ("", "bytes", None)
# Flag -> where it means something, and what it is there if it is not given.
ONLY = {
    "infra": ("sky", ""),
    "spot": ("sky", False),
    "gpus_per_node": ("slurm", 8),
    "cpus_per_task": ("slurm", 8),
    "sbatch": ("slurm", ()),
    "array": ("slurm", 0),
    "restarts": ("slurm", 100),
}
# The launcher says these itself.
TAKEN = [
    "job-name",
    "array",
    "chdir",
    "nodes",
    "ntasks-per-node",
    "gpus-per-node",
    "cpus-per-task",
    "output",
    "open-mode",
    "requeue",
    "signal",
]


def main(argv: Sequence[str] | None = None) -> int:
    """Submits a command line; returns the exit status."""
    try:
        own, command = _parse(sys.argv[1:] if argv is None else argv)
        options = _check(command, own)
        name = _name(options)
        command, logs = _here(command, options), None
        if own.sky:
            flag, place, mounts = ("workdir" if options.workdir else "runs"), options.workdir or options.runs, {}
            if BUCKET.fullmatch(place):
                place, mounts = mount(place, _has_hosts(own))
                command = _replaced(command, flag, place)
            text = task_file(name, command, own.sky, own.infra, own.nodes, own.spot, mounts)
        else:
            logs = Path(options.workdir or options.runs) / "logs"
            sizes = own.nodes, own.gpus_per_node, own.cpus_per_task, own.restarts
            text = batch_script(name, command, logs, *sizes, own.array, own.sbatch)
        suffix, submit = ("yaml", "sky jobs launch") if own.sky else ("sh", "sbatch")
        file = WRITTEN / f"{name}.{suffix}"
        if own.dry_run:
            print(f"{text}\n# would be submitted by: {submit} {shlex.quote(short(file))}")
            return 0
        return _submit(file, text, submit.split(), logs)
    except ConfigError as error:
        tell(f"error: {told(error)}")
        return MISTAKE


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The launcher's own options, and the arguments of `experiments.run`.

    Raises:
      ConfigError: an option that is wrong, or goes with another place.
    """
    parser = flags.Parser(
        prog="python -m experiments.launch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--sky", default="", metavar="ACCELERATORS", help="by SkyPilot, on these: tpu-v5litepod-256, tpu-v5p-256, H100:8 ...")
    add("--infra", help="with --sky: where: gcp, gcp/us-west4, aws, k8s, slurm ... (default: where it is cheapest)")
    add("--spot", action="store_true", default=None, help="with --sky: cheap machines that may be taken away")
    add("--slurm", action="store_true", help="by a Slurm script")
    add(
        "--nodes",
        type=int,
        default=1,
        metavar="N",
        help="machines, of the accelerators each (default %(default)s; a TPU slice is one)",
    )
    add(
        "--gpus_per_node",
        type=int,
        metavar="N",
        help=f"with --slurm (default {ONLY['gpus_per_node'][1]}; 0 to compute on CPUs)",
    )
    add("--cpus_per_task", type=int, metavar="N", help=f"with --slurm: cores of a process (default {ONLY['cpus_per_task'][1]})")
    add(
        "--array", type=int, metavar="N", help="with --slurm: N jobs, which share the runs of a study, or the seeds of a config"
    )
    add("--sbatch", action="append", metavar="OPTION", help="with --slurm: time=24:00:00, partition=a100 ...; again for more")
    add("--restarts", type=int, metavar="N", help=f"with --slurm: how often to requeue (default {ONLY['restarts'][1]})")
    add("--dry_run", action="store_true", help="print what would be submitted, and submit nothing")
    own, command = parser.parse_known_args(list(argv))
    if bool(own.sky) == own.slurm:
        raise ConfigError("a job needs one place: --sky=ACCELERATORS or --slurm")
    place = "sky" if own.sky else "slurm"
    if own.array is not None and own.array < 1:
        raise ConfigError(f"--array={own.array} is too few; give 1 or more, or leave it out")
    for name, (where, default) in ONLY.items():
        if getattr(own, name) is None:
            setattr(own, name, default)
        elif where != place:
            raise ConfigError(f"--{name} does not go with --{place}; it belongs to --{where}")
    for name, least in {"nodes": 1, "gpus_per_node": 0, "cpus_per_task": 1, "restarts": 0}.items():
        if getattr(own, name) < least:
            raise ConfigError(f"--{name}={getattr(own, name)} is too few; give {least} or more")
    if own.sky.lower().startswith("tpu-"):
        own.sky = own.sky.lower()
    own.sbatch = [option.lstrip("-") for option in own.sbatch]
    for option in own.sbatch:
        if option.split("=")[0] in TAKEN:
            raise ConfigError(f"--sbatch={option} is what the launcher says itself; see --help for its flag")
    if re.match(r"v\d", own.sky):
        raise ConfigError(
            f"--sky={own.sky} is not SkyPilot's name of a slice; write tpu-v5litepod-256, tpu-v5p-256 ... (sky gpus list)"
        )
    if own.nodes > 1 and own.sky.startswith("tpu-"):
        raise ConfigError(f"--nodes={own.nodes} does not go with --sky={own.sky}: a slice is one node; take a larger slice")
    return own, command


def _check(command: Sequence[str], own: argparse.Namespace) -> Options:
    """The command of `experiments.run`, after all that it checks itself before it trains.

    Raises:
      ConfigError: what it would say; or the job could not find its files, or would leave its runs where nobody finds them.
    """
    options = flags.parse(command, also=[f"--{name}" for name in vars(own)])
    if options.mode not in run.TRAINS or options.compile_for:
        asked = f"--compile_for={options.compile_for}" if options.compile_for else f"--{options.mode}"
        raise ConfigError(f"{asked} needs no other machine; run it here: python -m experiments.run {asked} ...")
    for name in ("devices", "coordinator", "processes", "process"):
        if getattr(options, name) not in (None, ""):
            raise ConfigError(f"--{name} does not go with the launcher, which tells every process where the others are")
    if options.fresh:
        raise ConfigError("--fresh would train again what is finished whenever the job is started again; give another --runs")
    if own.array and options.workdir:
        raise ConfigError(
            f"--array={own.array} does not go with --workdir={options.workdir}; jobs share the runs of a --runs=DIR"
        )
    if own.array > 1 and options.mode == "config" and (options.seeds or 1) < 2:
        raise ConfigError(f"--array={own.array} has one run to share; add --seeds=N, or leave it out")
    _check_place(options, own)
    configs = run.configs_of(options)

    from experiments.study import study_files
    from moejax.train.checks import check_config

    for arm, config in configs.items():
        try:
            check_config(config)
        except ConfigError as error:
            raise ConfigError(f"{error} (arm '{arm}')" if options.mode == "study" else str(error)) from None
        for key, path in _paths(config):
            _check_file(f"{key}={path}", REPOSITORY / path, own)
    if options.config:
        what, file = f"--config={options.config}", Path(options.config.partition(":")[0]).resolve()
    else:
        slug = options.study or flags.DEFAULT_STUDY
        what, file = f"--study={slug}", study_files()[slug]
    if own.sky and not file.is_relative_to(REPOSITORY):
        raise ConfigError(f"{what} lies outside of {REPOSITORY}, which is what is sent to the machines; copy it there")
    _check_file(what, file, own)
    return options


def _check_place(options: Options, own: argparse.Namespace) -> None:
    flag, place = ("--workdir", options.workdir) if options.workdir else ("--runs", options.runs)
    if own.sky and BUCKET.fullmatch(place):
        return
    if "://" in place and own.slurm:
        raise ConfigError(
            f"{flag}={place}: the nodes of a Slurm cluster mount no bucket by themselves; mount it there and give the path"
        )
    if not place.startswith("/"):
        bucket = "a bucket (gs://, s3:// or r2://), or " if own.sky else ""
        raise ConfigError(f"{flag}='{place}' must be {bucket}an absolute path that all machines see, and that outlives them")


def _check_file(what: str, path: Path, own: argparse.Namespace) -> None:
    """Raises ConfigError if a file of the checkout is not there, or is not sent along since git ignores it."""
    if not path.exists():
        raise ConfigError(
            f"{what} is not in {REPOSITORY}, where the job would look for it; give an absolute path of its machines"
        )
    ignored = ["git", "-C", str(REPOSITORY), "check-ignore", "--quiet", "--", str(path)]
    if own.sky and subprocess.run(ignored, stderr=subprocess.DEVNULL).returncode == 0:
        raise ConfigError(
            f"{what} is ignored by git, and so not sent to the machines; move it, or give an absolute path of theirs"
        )


def _paths(config: Any) -> Iterator[tuple[str, str]]:
    """Key and value of what a config, and those inside it, name relative to the checkout."""
    for name, value in config.items():
        if isinstance(value, Mapping | ConfigDict):
            yield from ((f"{name}.{key}", path) for key, path in _paths(value))
        elif name in PATHS and value not in NO_PATH and not str(value).startswith(("/", "~")) and "://" not in str(value):
            yield name, str(value)


def _has_hosts(own: argparse.Namespace) -> bool:
    """Whether several machines write checkpoints together; a slice of at most 8 cores or chips is one."""
    size = re.fullmatch(r"tpu-.*-(\d+)", own.sky)
    return own.nodes > 1 or (size is not None and int(size[1]) > 8)


def _name(options: Options) -> str:
    what = Path(options.config.partition(":")[0]).stem if options.config else options.study or flags.DEFAULT_STUDY
    return "moejax-" + re.sub(r"[^a-z0-9]+", "-", what.lower()).strip("-")


def _here(command: Sequence[str], options: Options) -> list[str]:
    """The command as it is given in the checkout's folder."""
    if not options.config:
        return list(command)
    file, colon, argument = options.config.partition(":")
    path = Path(file).resolve()
    path = path.relative_to(REPOSITORY) if path.is_relative_to(REPOSITORY) else path
    return _replaced(command, "config", f"{path}{colon}{argument}")


def _replaced(command: Sequence[str], flag: str, value: str) -> list[str]:
    """The arguments with another value of a flag, which stands there as `--flag=VALUE` or `--flag VALUE`."""
    items, found = iter(command), []
    for item in items:
        if item == f"--{flag}":
            next(items)
        found.append(f"--{flag}={value}" if item.split("=")[0] == f"--{flag}" else item)
    return found


def _submit(file: Path, text: str, command: Sequence[str], logs: Path | None) -> int:
    """Writes what is submitted, and submits it.

    Raises:
      ConfigError: there is no such program here, or no log could be written.
    """
    if shutil.which(command[0]) is None:
        what = "pip install 'moejax[launch]'" if command[0] == "sky" else "submit from a machine of the cluster, or use --sky"
        raise ConfigError(f"there is no '{command[0]}' here; {what}")
    if logs:
        try:
            logs.mkdir(parents=True, exist_ok=True)  # Slurm does not
        except OSError as error:
            raise ConfigError(f"{logs} cannot be made ({error.strerror}); --runs is a folder that all machines see") from None
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return subprocess.run([*command, str(file)]).returncode


if __name__ == "__main__":
    sys.exit(main())
