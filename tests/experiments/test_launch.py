"""Pod jobs: what is started where, and again after preemptions and failures. gcloud and Slurm are played by the test."""

import os
import shlex
import subprocess
import time

import pytest

from experiments import launch
from experiments.launch import Done, Tpu

RUN = ["--config=configs/base_lm.py", "--runs=/shared/runs"]
TPU = Tpu("pod", "zone-a", create="v5litepod-16", spot=True)


class Cloud:
    """A gcloud: slices that exist or not, and jobs that end as told. `log` has what was asked, in order."""

    def __init__(self, states, endings, running=False):
        self.states, self.endings, self.running, self.log = list(states), list(endings), running, []

    def __call__(self, command):
        verb, words = command[4] if command[0] == "gcloud" else "pack", " ".join(command)
        self.log.append(verb)
        if verb == "describe":
            state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
            return Done(1) if state == "missing" else Done(0, state + "\n")
        if verb == "create":
            self.states = ["CREATING", "READY"]
        if verb == "ssh":
            self.log[-1] = next(name for mark, name in MARKS.items() if mark in words)
        if self.log[-1] == "follow":
            ending = self.endings.pop(0)
            if ending == "preempted":
                self.states = ["PREEMPTED"]
                return Done(launch.LOST)
            return Done(ending)
        return Done(0 if self.log[-1] != "running?" or self.running else 1)


MARKS = {"kill -0": "running?", "pip install": "install", "experiments.run": "start", "tail": "follow"}
START = ["pack", "scp", "install", "start", "follow"]


def run(cloud, restarts=3):
    return launch.run_tpu(TPU, RUN, restarts, cloud, sleep=lambda seconds: None)


def test_a_job_is_started_on_all_workers_and_followed_to_its_end():
    cloud = Cloud(["READY"], [0])
    assert run(cloud) == 0
    assert cloud.log == ["describe", "running?", *START]


def test_a_slice_that_is_not_there_is_made_first():
    cloud = Cloud(["missing"], [0])
    assert run(cloud) == 0
    assert cloud.log[:2] == ["describe", "create"]


def test_a_preempted_slice_is_made_again_and_the_job_started_again():
    cloud = Cloud(["READY"], ["preempted", 0])
    assert run(cloud) == 0
    restart = cloud.log.index("follow") + 1
    assert cloud.log[restart:] == ["describe", "describe", "delete", "create", *START]


def test_a_failed_worker_starts_all_again_but_a_mistake_does_not():
    cloud = Cloud(["READY"], [1, 143, 0])
    assert run(cloud) == 0
    assert cloud.log.count("start") == 3
    mistaken = Cloud(["READY"], [launch.MISTAKE])
    assert run(mistaken) == launch.MISTAKE
    assert mistaken.log.count("start") == 1


def test_restarts_have_an_end():
    cloud = Cloud(["READY"], [1] * 10)
    assert run(cloud, restarts=2) == 1
    assert cloud.log.count("start") == 3


def test_a_running_job_is_found_again_and_a_lost_connection_is_no_failure():
    cloud = Cloud(["READY"], [launch.LOST, 0], running=True)
    assert run(cloud) == 0
    assert "start" not in cloud.log
    assert cloud.log.count("follow") == 2


def test_without_create_a_missing_slice_is_an_error():
    with pytest.raises(launch.ConfigError, match="not there; say what to make with --create"):
        launch.run_tpu(Tpu("pod", "zone-a"), RUN, 0, Cloud(["missing"], []))


@pytest.fixture
def worker(tmp_path):
    """A home directory whose Python notes how it was called and does what the test says; gives the folder."""
    python = tmp_path / "moejax" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    (tmp_path / "moejax" / "logs").mkdir()
    python.write_text('#!/bin/bash\necho "$MOEJAX_COORDINATOR $@"\nbash job.sh\n')
    python.chmod(0o755)
    return tmp_path / "moejax"


def test_the_workers_script_outlives_its_shell_keeps_a_log_and_a_status(worker):
    (worker / "job.sh").write_text("sleep 0.5; echo done; exit 7\n")
    begin = time.monotonic()
    subprocess.run(["bash", "-c", launch.worker_script(RUN)], cwd=worker.parent, check=True)
    assert time.monotonic() - begin < 0.4
    followed = subprocess.run(["bash", "-c", launch.FOLLOW], cwd=worker.parent, capture_output=True, text=True, timeout=20)
    assert followed.returncode == 7
    assert followed.stdout.splitlines() == [f"auto -m experiments.run {shlex.join(RUN)}", "done"]


def test_the_workers_script_ends_an_earlier_job(worker):
    (worker / "job.sh").write_text("touch started; sleep 60\n")
    subprocess.run(["bash", "-c", launch.worker_script(RUN)], cwd=worker.parent, check=True)
    first = int((worker / "logs" / "pid").read_text())
    while not (worker / "started").exists():
        time.sleep(0.05)
    (worker / "job.sh").write_text("exit 0\n")
    subprocess.run(["bash", "-c", launch.worker_script(RUN)], cwd=worker.parent, check=True)
    assert subprocess.run(["bash", "-c", launch.FOLLOW], cwd=worker.parent, capture_output=True, timeout=20).returncode == 0
    deadline = time.monotonic() + 20
    while os.path.exists(f"/proc/{first}") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{first}")


def test_sources_are_packed_with_changes_and_without_what_git_ignores(tmp_path, monkeypatch):
    (tmp_path / "repo").mkdir()
    monkeypatch.setattr(launch, "REPOSITORY", tmp_path / "repo")
    monkeypatch.setattr(launch.tempfile, "gettempdir", lambda: str(tmp_path))
    for name, text in {"a.py": "1", "b.py": "2", ".gitignore": "runs/\n", "runs/x": "no"}.items():
        (tmp_path / "repo" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "repo" / name).write_text(text)
    subprocess.run("git init -q && git add a.py && echo changed > a.py", shell=True, cwd=tmp_path / "repo", check=True)
    subprocess.run(launch.starting(TPU, RUN)[0], check=True)
    listed = subprocess.run(["tar", "-tzf", tmp_path / "moejax-pod.tar.gz"], capture_output=True, text=True, check=True).stdout
    assert sorted(listed.split()) == [".gitignore", "a.py", "b.py"]
    text = subprocess.run(["tar", "-xOzf", tmp_path / "moejax-pod.tar.gz", "a.py"], capture_output=True, text=True).stdout
    assert text == "changed\n"


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (1, True), (143, True), (2, False)])
def test_the_batch_script_requeues_what_was_cut_off(tmp_path, status, requeued):
    for name, body in {"srun": f'echo "$@" > srun.log; exit {status}', "scontrol": 'echo "$@" > requeued'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    script = launch.batch_script(RUN, nodes=2, gpus=8, options=["time=24:00:00"], restarts=5)
    assert "#SBATCH --ntasks-per-node=8\n" in script
    assert "#SBATCH --time=24:00:00\n" in script
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "12"}
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, timeout=60)
    assert done.returncode == status
    assert (tmp_path / "srun.log").read_text().strip().endswith(f"python -m experiments.run {shlex.join(RUN)}")
    assert (tmp_path / "requeued").exists() == requeued
    (tmp_path / "requeued").unlink(missing_ok=True)
    subprocess.run(["bash", "-c", script], cwd=tmp_path, env={**environment, "SLURM_RESTART_COUNT": "5"}, timeout=60)
    assert not (tmp_path / "requeued").exists()


def test_a_dry_run_prints_what_each_worker_would_do_and_does_nothing(capsys, monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)
    assert launch.main(["--tpu=pod", "--zone=zone-a", "--create=v5litepod-16", "--dry_run", *RUN]) == 0
    printed = capsys.readouterr().out
    assert "gcloud compute tpus tpu-vm create pod --accelerator-type=v5litepod-16" in printed
    assert "--worker=all" in printed
    assert "experiments.run --config=configs/base_lm.py --runs=/shared/runs" in printed
    assert launch.main(["--slurm", "--nodes=4", "--dry_run", *RUN]) == 0
    assert "#SBATCH --nodes=4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (RUN, "one place"),
        (["--tpu=pod", "--slurm", *RUN], "one place"),
        (["--tpu=pod", *RUN], "needs --zone"),
        (["--slurm", "--config=configs/base_lm.py", "--runs=runs"], "absolute path that all workers see"),
        (["--slurm", "--config=configs/base_ml.py", "--runs=/shared"], "did you mean 'configs/base_lm.py'"),
        (["--slurm", "--studdy=switch", "--runs=/shared"], "did you mean '--study'"),
    ],
)
def test_mistakes_are_found_before_anything_is_started(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)
    assert launch.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_the_jobs_of_the_pages_are_right(capsys, monkeypatch):
    monkeypatch.chdir(launch.REPOSITORY)
    lines = [
        line
        for line in (launch.REPOSITORY / "docs/meshes_and_pods.md").read_text().splitlines()
        if "-m experiments.launch" in line
    ]
    assert len(lines) == 2
    for line in lines:
        assert launch.main([*shlex.split(line)[3:], "--dry_run"]) == 0
