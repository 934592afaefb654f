"""`sbatch`, `srun` and `scontrol` as far as a job's script needs them: they refuse what Slurm's refuse, and start a job again.

    install(folder) -> puts the three into folder/bin, and notes of what they did into folder

`sbatch` returns when the job has ended for good. Files in the folder say what is to happen: `status`, that `srun` starts nothing and
ends with it; `limit`, that the time is up, once, when a file that matches the pattern in it has the word that is in it.
"""

import glob
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

FOLDER, JOB = Path(os.environ.get("FAKE_SLURM", ".")), "12"
NUMBER, TIME = r"[1-9]\d*", r"(\d+-)?\d+(:\d+){0,2}"
SBATCH = {
    "job-name": r"\S+",
    "chdir": ".+",
    "output": ".+",
    "open-mode": "append|truncate",
    "nodes": rf"{NUMBER}(-{NUMBER})?",
    "ntasks-per-node": NUMBER,
    "gpus-per-node": rf"(\w+:)?{NUMBER}",
    "cpus-per-task": NUMBER,
    "requeue": None,
    "array": r"0-\d+",
    "signal": r"([BR]+:)?([A-Z]+|\d+)(@\d+)?",
    "time": TIME,
    "partition": r"\w+",
}
SRUN = {"cpus-per-task": NUMBER, "kill-on-bad-exit": "[01]"}


def install(folder: Path) -> Path:
    """The folder to put before others on PATH."""
    (bin := folder / "bin").mkdir(parents=True)
    for name in ("sbatch", "srun", "scontrol"):
        (bin / name).write_text(f'#!/bin/sh\nFAKE_SLURM={folder} exec {sys.executable} {__file__} {name} "$@"\n')
        (bin / name).chmod(0o755)
    return bin


def sbatch(arguments: list[str]) -> int:
    (file,) = arguments
    script = Path(file).read_text()
    if not script.startswith("#!"):
        return refuse("This does not look like a batch script")
    options = {}
    for line in script.splitlines():
        if line.startswith("#SBATCH "):
            options |= parse(shlex.split(line)[1:], SBATCH)
        elif line.strip() and not line.startswith("#"):
            break  # Slurm looks no further
    folder = Path(options.get("chdir", "."))
    log = folder / options["output"].replace("%j", JOB)
    if not folder.is_dir() or not log.parent.is_dir():
        return refuse(f"cannot open {log} in {folder}: No such file or directory")  # Slurm's job fails without a word
    print(f"Submitted batch job {JOB}")
    if "array" not in options:
        return run(script, options, log, JOB, {})
    if "%A" not in options["output"] or "%a" not in options["output"]:
        return refuse("tasks of an array would write one log")
    threads = []
    for task in range(int(options["array"].removeprefix("0-")) + 1):
        # Each task is a job of its own, with a number of its own.
        own = {"SLURM_ARRAY_JOB_ID": JOB, "SLURM_ARRAY_TASK_ID": str(task)}
        file = log.with_name(log.name.replace("%A", JOB).replace("%a", str(task)))
        threads.append(threading.Thread(target=run, args=(script, options, file, str(int(JOB) + task), own)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    return 0


def run(script: str, options: dict[str, str], log: Path, job: str, more: dict[str, str]) -> int:
    """One job, until it has ended for good."""
    folder, restarts = options.get("chdir", "."), 0
    while True:
        environment = {**os.environ, **more, "SLURM_JOB_ID": job} | ({"SLURM_RESTART_COUNT": str(restarts)} if restarts else {})
        with log.open("a" if options.get("open-mode") == "append" else "w") as stream:
            done = subprocess.run(["bash", "-c", script], cwd=folder, env=environment, stdout=stream, stderr=stream)
        note("ended", done.returncode)
        requeued = FOLDER / f"requeued.{job}"
        if not requeued.exists():
            return 0
        requeued.unlink()
        restarts += 1


def srun(arguments: list[str]) -> int:
    at = next(i for i, item in enumerate(arguments) if not item.startswith("--"))
    parse(arguments[:at], SRUN)
    note("started", shlex.join(arguments[at:]))
    if (FOLDER / "status").exists():
        return int((FOLDER / "status").read_text())
    job = subprocess.Popen(arguments[at:])
    if (FOLDER / "limit").exists():
        pattern, word = (FOLDER / "limit").read_text().split("\n")
        (FOLDER / "limit").unlink()
        while job.poll() is None and not any(word in Path(file).read_text() for file in glob.glob(pattern)):
            time.sleep(0.02)
        job.send_signal(signal.SIGTERM)
    return status if (status := job.wait()) >= 0 else 128 - status


def scontrol(arguments: list[str]) -> int:
    if len(arguments) != 2 or arguments[0] != "requeue" or arguments[1] != os.environ["SLURM_JOB_ID"]:
        return refuse(f"invalid: {arguments}")
    (FOLDER / f"requeued.{arguments[1]}").touch()
    return 0


def parse(items: list[str], known: dict[str, str | None]) -> dict[str, str]:
    found = {}
    for item in items:
        name, equals, value = item.removeprefix("--").partition("=")
        if not item.startswith("--") or name not in known:
            sys.exit(refuse(f"unrecognized option '{item}'"))
        pattern = known[name]
        if bool(equals) != (pattern is not None) or (pattern and not re.fullmatch(pattern, value)):
            sys.exit(refuse(f"Invalid --{name} specification: '{value}'"))
        found[name] = value
    return found


def refuse(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 1


def note(what: str, value: object) -> None:
    with (FOLDER / what).open("a") as stream:
        stream.write(f"{value}\n")


if __name__ == "__main__":
    sys.exit({"sbatch": sbatch, "srun": srun, "scontrol": scontrol}[sys.argv[1]](sys.argv[2:]))
