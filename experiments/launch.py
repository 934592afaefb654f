"""Pod jobs: the same command on every worker of a TPU slice or a Slurm allocation, one log, and again after a preemption.

    python -m experiments.launch --tpu=NAME --zone=us-west4-a --config=configs/pods/mixtral_8x7b.py --runs=/mnt/shared/runs
    python -m experiments.launch --slurm --nodes=4 --config=configs/pods/mixtral_8x7b.py --runs=/shared/runs
    python -m experiments.launch ... --dry_run      # prints every command, and what each worker would do

What is not a flag of the launcher goes to `experiments.run` and is checked before anything is started. `--runs` (or `--workdir`) must
be a folder that all workers see, since training goes on from the newest checkpoint there.

TPU: the sources are copied to all workers and installed, the job is started on each, and the log of worker 0 is shown until it ends.
If the slice is preempted it is made again (`--create`), and if a worker fails all are started again. Closing the laptop does not end
the job; the same command finds it. Slurm: a batch script is submitted that requeues itself.
"""

import argparse
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from experiments import flags
from experiments.environment import REPOSITORY
from experiments.terminal import told
from moejax.core.errors import ConfigError
from moejax.core.text import tell

HOME = "moejax"  # folder on the workers, below the home directory
PAUSE = 30.0  # seconds between two looks at a slice that is not ready, and before a restart
MISTAKE = 2  # exit status of a wrong command line: starting it again would not help
LOST = 255  # exit status of ssh when the worker is gone

Shell = Callable[[Sequence[str]], "Done"]


@dataclass(frozen=True)
class Done:
    """How a command ended; `output` is what it printed, if that was asked for."""

    status: int
    output: str = ""


@dataclass(frozen=True)
class Tpu:
    """A slice of a TPU pod.

    Attributes:
      name, zone, project: of the slice; empty project for gcloud's own.
      create: accelerator type to make it with if it is not there, 'v5litepod-256'; empty to never make one.
      image: its software version.
      spot: cheap and preemptible.
    """

    name: str
    zone: str
    project: str = ""
    create: str = ""
    image: str = "v2-alpha-tpuv5-lite"
    spot: bool = False

    def gcloud(self, verb: str, *rest: str) -> list[str]:
        """A gcloud command in its zone."""
        where = [f"--zone={self.zone}", *([f"--project={self.project}"] if self.project else [])]
        return ["gcloud", "compute", "tpus", "tpu-vm", verb, *rest, *where]

    def ssh(self, worker: str, script: str) -> list[str]:
        """A script on one worker, or on 'all'."""
        return self.gcloud("ssh", self.name, f"--worker={worker}", f"--command={script}")

    def making(self) -> list[str]:
        """The command that creates it."""
        options = [f"--accelerator-type={self.create}", f"--version={self.image}", *(["--spot"] if self.spot else [])]
        return self.gcloud("create", self.name, *options)


def run_tpu(tpu: Tpu, command: Sequence[str], restarts: int, shell: Shell, sleep: Callable[[float], None] = time.sleep) -> int:
    """Runs a job to its end, through preemptions and failures; returns its exit status.

    Args:
      tpu: where.
      command: arguments of `experiments.run`.
      restarts: how often to start again.
      shell: runs a command here; replaced in tests.
    """
    for attempt in range(restarts + 1):
        if attempt:
            print(f"restart {attempt} of {restarts}", flush=True)
            sleep(PAUSE)
        if not _make_ready(tpu, shell, sleep):
            continue
        # A job that an earlier launcher has started goes on, unless this one has seen it fail.
        running = not attempt and shell(tpu.ssh("0", "kill -0 $(cat moejax/logs/pid)")).status == 0
        if not running and any(shell(step).status for step in starting(tpu, command)):
            continue
        while (followed := shell(tpu.ssh("0", FOLLOW)).status) == LOST and _state(tpu, shell) == "READY":
            sleep(PAUSE)  # the connection was lost, not the worker
        if followed in (0, MISTAKE):
            return followed
        print(f"the job ended with status {followed}", flush=True)
    return 1


def starting(tpu: Tpu, command: Sequence[str]) -> list[list[str]]:
    """The commands that install the sources on all workers and start the job there."""
    archive, sources = f"{tempfile.gettempdir()}/{HOME}-{tpu.name}.tar.gz", shlex.quote(str(REPOSITORY))
    # What git knows of this checkout, changes included.
    pack = f"git -C {sources} ls-files -co --exclude-standard -z | tar -C {sources} --null --ignore-failed-read -T - -czf {archive}"
    return [
        ["bash", "-c", pack],
        tpu.gcloud("scp", archive, f"{tpu.name}:{HOME}.tar.gz", "--worker=all"),
        tpu.ssh("all", INSTALL),
        tpu.ssh("all", worker_script(command)),
    ]


# Installing twice costs little: pip finds what is there.
INSTALL = (
    f"mkdir -p {HOME}/logs && tar -xzf {HOME}.tar.gz -C {HOME} && cd {HOME} && "
    "{ [ -d .venv ] || python3 -m venv .venv; } && .venv/bin/pip install --quiet --editable '.[tpu]'"
)
# Until the job of this worker ends, and then its status.
FOLLOW = f"cd {HOME}/logs && tail -n +1 --pid=$(cat pid) -F run.log 2> /dev/null; exit $(cat status)"


def worker_script(command: Sequence[str]) -> str:
    """What each worker of a TPU slice does: end an earlier job, and start this one so that it outlives the connection."""
    job = f"MOEJAX_COORDINATOR=auto .venv/bin/python -m experiments.run {shlex.join(command)}; echo $? > logs/status"
    return (
        f"cd {HOME} && {{ kill -- -$(cat logs/pid) 2> /dev/null; rm -f logs/status; "
        f"setsid nohup bash -c {shlex.quote(job)} > logs/run.log 2>&1 < /dev/null & echo $! > logs/pid; }}"
    )


def batch_script(command: Sequence[str], nodes: int, gpus: int, options: Sequence[str], restarts: int) -> str:
    """The Slurm batch script of a job: one task a GPU, the log of the first, requeued when it is preempted or fails.

    Slurm sends SIGTERM two minutes before the time limit, which `fit` answers with a checkpoint and status 143.
    """
    lines = [
        "#!/bin/bash",
        "#SBATCH --job-name=moejax",
        f"#SBATCH --nodes={nodes}",
        f"#SBATCH --gpus-per-node={gpus}",
        f"#SBATCH --ntasks-per-node={gpus}",
        "#SBATCH --output=logs/%j.log",
        "#SBATCH --open-mode=append",
        "#SBATCH --requeue",
        "#SBATCH --signal=TERM@120",
        *(f"#SBATCH --{option}" for option in options),
        "",
        "mkdir -p logs",
        "export MOEJAX_COORDINATOR=auto",
        f'srun --kill-on-bad-exit=1 --output="logs/$SLURM_JOB_ID.%t.log" --open-mode=append python -m experiments.run {shlex.join(command)} &',
        "job=$!",
        'tail -n +1 --pid=$job -F "logs/$SLURM_JOB_ID.0.log" 2> /dev/null',
        "wait $job",
        "status=$?",
        f'if [ $status -ne 0 ] && [ $status -ne {MISTAKE} ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {restarts} ]; then',
        '    scontrol requeue "$SLURM_JOB_ID"',
        "fi",
        "exit $status",
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit status."""
    try:
        options, command = _parse(sys.argv[1:] if argv is None else argv)
        if options.slurm:
            return _submit(options, command)
        tpu = Tpu(options.tpu, options.zone, options.project, options.create, options.image, options.spot)
        if options.dry_run:
            _show(tpu, command)
            return 0
        return run_tpu(tpu, command, options.restarts, _run)
    except ConfigError as error:
        tell(f"error: {told(error)}")
        return MISTAKE
    except KeyboardInterrupt:
        tell("the job goes on; the same command shows its log again")
        return 130


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The launcher's own options, and the arguments of `experiments.run`.

    Raises:
      ConfigError: either of them is wrong, or the runs would lie where only one worker sees them.
    """
    parser = argparse.ArgumentParser(
        prog="python -m experiments.launch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--tpu", default="", metavar="NAME", help="TPU slice to run on")
    add("--zone", default="", help="its zone")
    add("--project", default="", help="its project, if not gcloud's own")
    add("--create", default="", metavar="TYPE", help="make it if it is not there: v5litepod-256, v5p-256 ...")
    add("--image", default=Tpu.image, help="its software version (default %(default)s)")
    add("--spot", action="store_true", help="make it cheap and preemptible")
    add("--slurm", action="store_true", help="submit to Slurm instead")
    add("--nodes", type=int, default=1, help="with --slurm")
    add("--gpus_per_node", type=int, default=8, help="with --slurm")
    add(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="with --slurm: time=24:00:00, partition=a100 ...; again for more",
    )
    add("--restarts", type=int, default=100, metavar="N", help="how often to start again (default %(default)s)")
    add("--dry_run", action="store_true", help="print the commands and run none")
    options, command = parser.parse_known_args(list(argv))
    if bool(options.tpu) == options.slurm:
        raise ConfigError("a job needs one place: --tpu=NAME or --slurm")
    if options.tpu and not options.zone:
        raise ConfigError(f"--tpu={options.tpu} needs --zone=ZONE")
    run = flags.parse(command)
    if run.config:
        flags.load_config(run.config)
    place = run.workdir or run.runs
    if not place.startswith("/"):
        raise ConfigError(
            f"--runs='{place}' must be an absolute path that all workers see, such as a mounted bucket or NFS folder"
        )
    return options, command


def _make_ready(tpu: Tpu, shell: Shell, sleep: Callable[[float], None]) -> bool:
    """Waits for the slice, and makes it anew if it is gone; False if that failed.

    Raises:
      ConfigError: it is gone, and how to make it is not said.
    """
    while (state := _state(tpu, shell)) not in ("READY", "PREEMPTED", "TERMINATED", "STOPPED", ""):
        print(f"{tpu.name} is {state}", flush=True)
        sleep(PAUSE)
    if state == "READY":
        return True
    if not tpu.create:
        raise ConfigError(f"{tpu.name} in {tpu.zone} is {state or 'not there'}; say what to make with --create=v5litepod-256")
    if state:
        shell(tpu.gcloud("delete", tpu.name, "--quiet"))
    return shell(tpu.making()).status == 0


def _state(tpu: Tpu, shell: Shell) -> str:
    """What gcloud says of the slice: READY, CREATING, PREEMPTED ...; empty if there is none."""
    found = shell(tpu.gcloud("describe", tpu.name, "--format=value(state)"))
    return found.output.strip() if found.status == 0 else ""


def _submit(options: argparse.Namespace, command: Sequence[str]) -> int:
    script = batch_script(command, options.nodes, options.gpus_per_node, options.sbatch, options.restarts)
    if options.dry_run:
        print(script)
        return 0
    return subprocess.run(["sbatch"], input=script, text=True).returncode


def _show(tpu: Tpu, command: Sequence[str]) -> None:
    print("# look at the slice, and make it if it is gone")
    print(shlex.join(tpu.gcloud("describe", tpu.name, "--format=value(state)")))
    if tpu.create:
        print(shlex.join(tpu.making()))
    print("# copy the sources to all workers, install them, and start the job on each")
    for step in starting(tpu, command):
        print(shlex.join(step))
    print("# show the log of worker 0; again from the top if the slice is preempted or a worker fails")
    print(shlex.join(tpu.ssh("0", FOLLOW)))


def _run(command: Sequence[str]) -> Done:
    """A command whose output is shown, unless it is the answer to a question."""
    if "describe" in command:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        return Done(done.returncode, done.stdout)
    return Done(subprocess.run(command).returncode)


if __name__ == "__main__":
    sys.exit(main())
