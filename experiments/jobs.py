"""The texts of jobs: a task file of SkyPilot, and a Slurm script. See `experiments.launch`, which submits them."""

import json
import re
import shlex
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.environment import REPOSITORY
from experiments.run import LOST
from moejax.core.errors import ConfigError

# Exit statuses that ask for another start: a process was lost, or SIGTERM was answered with a checkpoint (128 + 15).
AGAIN = (LOST, 143)
BUCKET = re.compile(r"(gs|s3|r2)://([^/]+)/*(.*)")


def task_file(
    name: str,
    command: Sequence[str],
    accelerators: str,
    infra: str = "",
    nodes: int = 1,
    spot: bool = False,
    mounts: Mapping[str, Mapping[str, str]] | None = None,
) -> str:
    """The task of SkyPilot that runs a command on every host of a TPU slice, or on every node of GPUs.

    Preemptions are SkyPilot's to mend; that a failed setup or any other exit status is not tried again is its default.

    Args:
      accelerators, infra: in SkyPilot's words: 'tpu-v5p-256', 'H100:8'; 'gcp/us-west4', 'k8s', or empty for the cheapest.
      mounts: path -> what is mounted there, of `mount`.
    """
    tpu = accelerators.startswith("tpu-")
    extras = f"{'tpu' if tpu else 'gpu'},tokenizers"
    setup = [
        "set -e",
        "command -v uv > /dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh",
        'export PATH="$HOME/.local/bin:$PATH"',
        # An image's own Python may be too old; this one's version is known to do.
        f"uv venv --allow-existing --python {sys.version_info.major}.{sys.version_info.minor} .venv",
        f"uv pip install --python .venv/bin/python --editable '.[{extras}]'",
    ]
    together = []
    if tpu:
        together = ["export MOEJAX_COORDINATOR=auto"]
    elif nodes > 1:
        together = [
            'export MOEJAX_COORDINATOR="$(head -n 1 <<< "$SKYPILOT_NODE_IPS"):8476"',
            'export MOEJAX_PROCESSES="$SKYPILOT_NUM_NODES" MOEJAX_PROCESS="$SKYPILOT_NODE_RANK"',
        ]
    lines = [
        f"name: {name}",
        f"workdir: {json.dumps(str(REPOSITORY))}",
        f"num_nodes: {nodes}",
        "resources:",
        f"  accelerators: {json.dumps(accelerators)}",
        *([f"  infra: {json.dumps(infra)}"] if infra else []),
        f"  use_spot: {json.dumps(spot)}",
        "  job_recovery:",
        f"    recover_on_exit_codes: {json.dumps(AGAIN)}",
        *(["file_mounts:"] if mounts else []),
        *(f"  {json.dumps(path)}: {json.dumps(what)}" for path, what in (mounts or {}).items()),
        "setup: |",
        textwrap.indent("\n".join(setup), "  "),
        # No `exec` and no `exit`: what SkyPilot appends waits until a cached mount is uploaded.
        "run: |",
        textwrap.indent("\n".join([*together, f".venv/bin/python -m experiments.run {shlex.join(command)}"]), "  "),
    ]
    return "\n".join(lines) + "\n"


def mount(bucket: str, several: bool) -> tuple[str, dict[str, dict[str, str]]]:
    """The path that a job uses in the place of `gs://bucket/folder`, and what SkyPilot has to mount for it.

    One host has a cache between itself and the bucket, and so all that files can do. Several hosts write one checkpoint together and
    have to see at once what the others write: `MOUNT`, in which only Google's file system can append and rename.

    Raises:
      ConfigError: a bucket that several hosts cannot share.
    """
    store, name, folder = BUCKET.fullmatch(bucket).groups()
    if several and store != "gs":
        raise ConfigError(
            f"{bucket}: several machines cannot write checkpoints together in a bucket of {store}://; give one of gs://, or a folder of a file "
            "system that all see"
        )
    what = {"source": f"{store}://{name}", "mode": "MOUNT" if several else "MOUNT_CACHED"}
    return f"/mnt/{name}/{folder}".rstrip("/"), {f"/mnt/{name}": what}


def batch_script(
    name: str,
    command: Sequence[str],
    logs: Path,
    nodes: int,
    gpus: int,
    cpus: int,
    restarts: int,
    array: int = 0,
    options: Sequence[str] = (),
) -> str:
    """The Slurm script that runs a command: one process a GPU, or one a node where there are none.

    Slurm sends SIGTERM two minutes before the time limit, which `fit` answers with a checkpoint and status 143.

    Args:
      logs: folder of the logs; Slurm does not make it.
      gpus, cpus: GPUs of a node, and cores of a process.
      restarts: how often the job may requeue itself.
      array: jobs that share the runs of the command, each as large as one would be; 0 for one that is no array.
      options: more of sbatch's, 'time=24:00:00'.
    """
    places = {"chdir": REPOSITORY, "output": logs / ("%A_%a.log" if array else "%j.log")}
    lines = [
        "#!/bin/bash",
        f"#SBATCH --job-name={name}",
        *(f"#SBATCH --{option}={shlex.quote(str(place))}" for option, place in places.items()),
        "#SBATCH --open-mode=append",
        *([f"#SBATCH --array=0-{array - 1}"] if array else []),
        f"#SBATCH --nodes={nodes}",
        f"#SBATCH --ntasks-per-node={max(gpus, 1)}",
        *([f"#SBATCH --gpus-per-node={gpus}"] if gpus else []),
        f"#SBATCH --cpus-per-task={cpus}",
        "#SBATCH --requeue",
        "#SBATCH --signal=TERM@120",
        *(f"#SBATCH --{option}" for option in options),
        "",
        # srun does not take the number over from sbatch.
        f"srun --cpus-per-task={cpus} --kill-on-bad-exit=1 {shlex.quote(sys.executable)} -m experiments.run {shlex.join(command)}",
        "status=$?",
        f"# {AGAIN[0]}: a process was lost; {AGAIN[1]}: the time is up, and a checkpoint saved. Anything else would fail again.",
        f"if [[ $status == {AGAIN[0]} || $status == {AGAIN[1]} ]] && (( ${{SLURM_RESTART_COUNT:-0}} < {restarts} )); then",
        '    scontrol requeue "$SLURM_JOB_ID"',
        "fi",
        "exit $status",
    ]
    return "\n".join(lines) + "\n"
