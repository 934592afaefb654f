"""Jobs on other machines: what would be submitted is right, by SkyPilot's own reading and before a Slurm that is played by the test."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib

import fake_slurm
import pytest
import yaml
from packaging.specifiers import SpecifierSet

from experiments import jobs, launch, run

RUN = ["--config=configs/small_lm.py", "--runs=/shared/runs"]
SKY = ["--sky=tpu-v5litepod-256", *RUN]
SLURM = ["--slurm", *RUN]


@pytest.fixture(autouse=True)
def checkout(tmp_path, monkeypatch):
    """Commands are given in the checkout, and what is submitted is written elsewhere."""
    monkeypatch.chdir(launch.REPOSITORY)
    monkeypatch.setattr(launch, "WRITTEN", tmp_path / "written")


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Makes a program that the test plays, `programs(name, its shell script)`; gives the folder."""

    def make(name, body):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\ncd {tmp_path}\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
        return tmp_path

    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return make


def shown(capsys, *arguments):
    """What a dry run prints: the text, and the command that would submit it."""
    assert launch.main([*arguments, "--dry_run"]) == 0
    text, submit = capsys.readouterr().out.split("# would be submitted by: ")
    return text, submit.strip()


def task(capsys, *arguments):
    return yaml.safe_load(shown(capsys, *arguments)[0])


class TestTask:
    @pytest.mark.slow
    def test_skypilot_reads_what_is_written(self, capsys, tmp_path):
        jobs = {
            "slice": ["--sky=tpu-v5p-256", "--infra=gcp/us-east5", "--spot", RUN[0], "--runs=gs://bucket/some/runs"],
            "gpus": ["--sky=H100:8", "--nodes=4", *RUN],
            "one": ["--sky=A100:8", "--infra=k8s", RUN[0], "--workdir=s3://bucket"],
        }
        files = {name: tmp_path / f"{name}.yaml" for name in jobs}
        for name, arguments in jobs.items():
            files[name].write_text(shown(capsys, *arguments)[0])
        environment = {**os.environ, "HOME": str(tmp_path), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
        done = subprocess.run(
            [sys.executable, "-c", READ, *files.values()], env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        found = dict(zip(jobs, json.loads(done.stdout.splitlines()[-1]), strict=True))
        again = {"recover_on_exit_codes": [75, 143], "strategy": None}
        assert found["slice"] == {
            "name": "moejax-small-lm",
            "workdir": str(launch.REPOSITORY),
            "nodes": 1,
            "accelerators": {"tpu-v5p-256": 1},
            # SkyPilot's choice: that of the slice's kind.
            "image": "v2-alpha-tpuv5",
            "infra": ["GCP", "us-east5"],
            "spot": True,
            "recovery": again,
            "mounts": {"/mnt/bucket": ["gs://bucket", "MOUNT"]},
        }
        several, one = found["gpus"], found["one"]
        assert (several["accelerators"], several["nodes"], several["spot"], several["mounts"]) == ({"H100": 8}, 4, False, {})
        assert (one["infra"], one["mounts"]) == (["Kubernetes", None], {"/mnt/bucket": ["s3://bucket", "MOUNT_CACHED"]})
        assert several["recovery"] == one["recovery"] == again

    def test_it_is_a_managed_job_of_some_25_lines(self, capsys):
        text, submit = shown(capsys, *SKY, "--infra=gcp", "--spot")
        assert submit.startswith("sky jobs launch /")
        assert text.count("\n") < 26

    @pytest.mark.parametrize(("accelerators", "extra"), [("tpu-v6e-8", "tpu"), ("H100:8", "gpu")])
    def test_setup_makes_a_python_that_moejax_knows_with_all_that_configs_need(self, capsys, programs, accelerators, extra):
        folder = programs("uv", 'echo "$@" >> asked')
        setup = task(capsys, f"--sky={accelerators}", *RUN)["setup"]
        subprocess.run(["bash", "-c", setup], cwd=folder, check=True)
        venv, install = (folder / "asked").read_text().splitlines()
        project = tomllib.loads((launch.REPOSITORY / "pyproject.toml").read_text())["project"]
        (python,) = re.findall(r"--python (\S+)", venv)
        assert SpecifierSet(project["requires-python"]).contains(python)
        extras = re.search(r"--editable \.\[(.*)\]$", install)[1].split(",")
        assert extras == [extra, "tokenizers"]
        assert set(extras) <= set(project["optional-dependencies"])

    def test_a_failed_setup_is_a_failure_and_is_not_tried_again(self, capsys, programs):
        folder = programs("uv", 'echo "$@" >> asked; exit 9')
        written = task(capsys, *SKY)
        assert subprocess.run(["bash", "-c", written["setup"]], cwd=folder).returncode == 9
        assert (folder / "asked").read_text().count("\n") == 1
        # 0 tries of what fails is SkyPilot's default; a failed setup ends with no status of its own.
        assert written["resources"]["job_recovery"] == {"recover_on_exit_codes": [75, 143]}
        assert list(jobs.AGAIN) == [75, 143]

    @pytest.mark.parametrize(
        ("place", "group"),
        [
            (["--sky=tpu-v5litepod-256"], "auto - -"),
            (["--sky=H100:8"], "- - -"),
            (["--sky=H100:8", "--nodes=3"], "10.0.0.1:8476 3 2"),
        ],
    )
    def test_each_host_runs_the_command_with_its_place_among_the_others(self, capsys, tmp_path, place, group):
        python = tmp_path / ".venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(
            '#!/bin/bash\necho "${MOEJAX_COORDINATOR:--} ${MOEJAX_PROCESSES:--} ${MOEJAX_PROCESS:--}"; printf "%s|" "$@"; echo; exit 75'
        )
        python.chmod(0o755)
        nodes = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2\n10.0.0.3", "SKYPILOT_NUM_NODES": "3", "SKYPILOT_NODE_RANK": "2"}
        # As SkyPilot does, which then waits for what is still being uploaded.
        hard = ["--config.data.data_dir=/it's\n$HOME: here", "--config.train.steps=7"]
        script = task(capsys, *place, *RUN, *hard)["run"] + "\ncode=$?\necho uploaded\nexit $code"
        clean = {key: value for key, value in os.environ.items() if not key.startswith("MOEJAX_")}
        done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=clean | nodes, capture_output=True, text=True)
        assert done.returncode == 75
        assert done.stdout == f"{group}\n{'|'.join(['-m', 'experiments.run', *RUN, *hard, ''])}\nuploaded\n"

    @pytest.mark.parametrize(
        ("place", "runs", "path", "mode"),
        [
            ("tpu-v5litepod-8", "gs://bucket", "/mnt/bucket", "MOUNT_CACHED"),
            ("tpu-v5litepod-16", "gs://bucket/a/b/", "/mnt/bucket/a/b", "MOUNT"),
            ("H100:8", "s3://bucket/a", "/mnt/bucket/a", "MOUNT_CACHED"),
        ],
    )
    def test_a_bucket_is_mounted_and_the_job_gets_the_path(self, capsys, place, runs, path, mode):
        for arguments in ([f"--runs={runs}"], ["--runs", runs]):
            written = task(capsys, f"--sky={place}", RUN[0], *arguments)
            assert written["file_mounts"] == {"/mnt/bucket": {"source": f"{runs[:5]}bucket", "mode": mode}}
            assert written["run"].rstrip().endswith(f"experiments.run {RUN[0]} --runs={path}")

    def test_every_command_is_a_job_of_its_own(self, programs):
        folder = programs("sky", 'echo "$@" >> asked; cat "${@: -1}" >> submitted')
        for steps in (7, 8):
            assert launch.main([*SKY, f"--config.train.steps={steps}"]) == 0
        assert (folder / "asked").read_text() == f"jobs launch {launch.WRITTEN}/moejax-small-lm.yaml\n" * 2
        assert re.findall(r"steps=(\d)", (folder / "submitted").read_text()) == ["7", "8"]


# What a task is, by SkyPilot.
READ = """
import json, sys
import sky
def described(task):
    (resources,) = task.resources
    mounts = {path: [storage.source, storage.mode.value] for path, storage in task.storage_mounts.items()}
    infra = [str(resources.cloud) if resources.cloud else None, resources.region]
    image = (resources.accelerator_args or {}).get("runtime_version")
    return {"name": task.name, "workdir": task.workdir, "nodes": task.num_nodes, "accelerators": resources.accelerators, "image": image,
            "infra": infra, "spot": resources.use_spot, "recovery": resources.job_recovery, "mounts": mounts}
print(json.dumps([described(sky.Task.from_yaml(file)) for file in sys.argv[1:]]))
"""


class TestSlurm:
    @pytest.fixture
    def cluster(self, tmp_path, monkeypatch):
        """A Slurm that is played by `fake_slurm`; gives the folder of its notes."""
        monkeypatch.setenv("PATH", f"{fake_slurm.install(tmp_path / 'slurm')}:{os.environ['PATH']}")
        for name in [name for name in os.environ if name.startswith(("SLURM_", "MOEJAX_"))]:
            monkeypatch.delenv(name)
        return tmp_path / "slurm"

    @pytest.mark.slow
    def test_a_job_whose_time_is_up_is_requeued_and_goes_on_from_its_checkpoint(self, cluster, tmp_path):
        runs = tmp_path / "shared runs"
        (cluster / "limit").write_text(f'{runs}/trained/*/metrics.jsonl\n"step": 20')
        small = ["--config.model.d_model=16", "--config.data.seq_len=16", "--config.data.batch_size=2"]
        steps = ["--config.train.steps=500", "--config.train.log_every=10", "--config.eval.batches=1"]
        place = ["--slurm", "--gpus_per_node=0", "--cpus_per_task=1", "--sbatch=time=24:00:00"]
        assert launch.main([*place, RUN[0], f"--runs={runs}", *small, *steps]) == 0
        assert (cluster / "ended").read_text().split() == ["143", "0"]
        (trained,) = (runs / "trained").glob("*/run.json")
        assert [p.name for p in (trained.parent / "checkpoints").iterdir() if p.name.isdigit()] == ["500"]
        logged = [json.loads(line)["step"] for line in (trained.parent / "metrics.jsonl").read_text().splitlines()]
        assert logged[:50] == [*range(10, 501, 10)]
        # The log is one, and what comes after the kill begins where it was cut off.
        before, step, after = re.split(r"stopped by signal 15 after step (\d+) of 500", (runs / "logs" / "12.log").read_text())
        assert 20 <= int(step) < 500
        assert f"step {step}/500  train" in after
        assert f"step {step}/500" not in before

    @pytest.mark.parametrize(("status", "starts"), [(0, 1), (1, 1), (launch.MISTAKE, 1), (137, 1), (143, 3), (run.LOST, 3)])
    def test_only_what_was_cut_off_is_requeued_and_not_for_ever(self, cluster, tmp_path, status, starts):
        (cluster / "status").write_text(str(status))
        assert launch.main(["--slurm", "--restarts=2", RUN[0], f"--runs={tmp_path}/new/runs"]) == 0
        assert (cluster / "ended").read_text().split() == [str(status)] * starts
        started = (cluster / "started").read_text().splitlines()
        assert started == [f"{sys.executable} -m experiments.run {RUN[0]} --runs={tmp_path}/new/runs"] * starts

    def test_each_job_of_an_array_is_requeued_by_itself_and_has_a_log_of_its_own(self, cluster, tmp_path):
        (cluster / "status").write_text(str(run.LOST))
        place = ["--slurm", "--array=3", "--gpus_per_node=1", "--restarts=1"]
        assert launch.main([*place, RUN[0], "--seeds=4", f"--runs={tmp_path}/runs"]) == 0
        assert (cluster / "ended").read_text().split() == [str(run.LOST)] * 6
        started = (cluster / "started").read_text().splitlines()
        assert started == [f"{sys.executable} -m experiments.run {RUN[0]} --seeds=4 --runs={tmp_path}/runs"] * 6
        assert sorted(path.name for path in (tmp_path / "runs" / "logs").iterdir()) == ["12_0.log", "12_1.log", "12_2.log"]

    @pytest.mark.slow
    def test_the_jobs_of_an_array_share_the_runs(self, cluster, tmp_path):
        small = ["--config.model.d_model=16", "--config.data.seq_len=16", "--config.data.batch_size=2"]
        steps = ["--config.train.steps=60", "--config.train.log_every=10", "--config.eval.batches=1"]
        place = ["--slurm", "--array=2", "--gpus_per_node=0", "--cpus_per_task=1"]
        assert launch.main([*place, RUN[0], "--seeds=4", f"--runs={tmp_path}/runs", *small, *steps]) == 0
        assert (cluster / "ended").read_text().split() == ["0", "0"]
        logs = [(tmp_path / "runs" / "logs" / f"12_{task}.log").read_text() for task in range(2)]
        done, cached = ([re.findall(rf"seed (\d).*{word}$", log, re.M) for log in logs] for word in ("done", "cached"))
        assert sorted(done[0] + done[1]) == ["0", "1", "2", "3"]
        assert all(done)
        for task in range(2):
            assert sorted(done[task] + cached[task]) == ["0", "1", "2", "3"]
        assert len(list((tmp_path / "runs").glob("trained/*/run.json"))) == 4
        # Both end with the same summary.
        assert len({log[log.index("eval/bits_per_byte  ") :] for log in logs}) == 1

    def test_a_job_that_is_cancelled_is_not_requeued(self, cluster, capsys):
        (cluster / "bin" / "srun").write_text(f"#!/bin/bash\ntouch {cluster}/running\nsleep 60\n")
        script, _ = shown(capsys, *SLURM)
        job = subprocess.Popen(["bash", "-c", script], start_new_session=True)
        while job.poll() is None and not (cluster / "running").exists():
            time.sleep(0.01)
        os.killpg(job.pid, signal.SIGTERM)
        assert job.wait(timeout=20) == -signal.SIGTERM
        assert not list(cluster.glob("requeued*"))

    def test_it_has_the_checkout_its_python_and_cores_for_every_process(self, capsys):
        text, submit = shown(capsys, *SLURM, "--nodes=4", "--gpus_per_node=6", "--cpus_per_task=12", "--sbatch=--partition=a")
        assert submit.startswith("sbatch /")
        for line in ("nodes=4", "ntasks-per-node=6", "gpus-per-node=6", "cpus-per-task=12", "partition=a"):
            assert f"#SBATCH --{line}\n" in text
        assert f"#SBATCH --chdir={launch.REPOSITORY}\n" in text
        assert f"srun --cpus-per-task=12 --kill-on-bad-exit=1 {sys.executable} -m" in text

    def test_what_slurm_refuses_is_a_failure(self, cluster, tmp_path, capfd):
        assert launch.main(["--slurm", RUN[0], f"--runs={tmp_path}/runs", "--sbatch=tiem=3"]) == 1
        assert "unrecognized option '--tiem=3'" in capfd.readouterr().err


class TestMistakes:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (RUN, "one place: --sky=ACCELERATORS or --slurm"),
            (["--slurm", *SKY], "one place"),
            # The launcher's own.
            ([*SLURM, "--node=4"], "did you mean '--nodes'"),
            ([*SLURM, "--sky_=x"], "did you mean '--sky'"),
            ([*SLURM, "--nodes=0"], "--nodes=0 is too few; give 1 or more"),
            ([*SLURM, "--nodes=two"], "--nodes: invalid int value: 'two'"),
            ([*SLURM, "--gpus_per_node=-1"], "--gpus_per_node=-1 is too few"),
            ([*SLURM, "--cpus_per_task=0"], "--cpus_per_task=0 is too few"),
            ([*SLURM, "--array=0"], "--array=0 is too few; give 1 or more"),
            ([*SLURM, "--array=2"], "--array=2 has one run to share; add --seeds=N"),
            (["--slurm", "--array=2", RUN[0], "--workdir=/shared/x"], "--array=2 does not go with --workdir=/shared/x"),
            ([*SKY, "--array=2"], "--array does not go with --sky; it belongs to --slurm"),
            ([*SLURM, "--restarts=-1"], "--restarts=-1 is too few"),
            ([*SLURM, "--spot"], "--spot does not go with --slurm; it belongs to --sky"),
            ([*SKY, "--restarts=3"], "--restarts does not go with --sky; it belongs to --slurm"),
            ([*SLURM, "--sbatch=nodes=3"], "--sbatch=nodes=3 is what the launcher says itself"),
            ([*SKY, "--nodes=2"], "a slice is one node"),
            (["--sky=v5p-256", *RUN], "--sky=v5p-256 is not SkyPilot's name of a slice; write tpu-v5litepod-256"),
            # Those that `experiments.run` finds.
            (["--slurm", "--studdy=switch", "--runs=/shared"], "did you mean '--study'"),
            (["--slurm", "--study=swich", "--runs=/shared"], "did you mean 'switch'"),
            (["--slurm", "--study=switch", "--preset=cup", "--runs=/shared"], "did you mean 'cpu'"),
            (["--slurm", "--study=switch", "--arms=swich", "--runs=/shared"], "did you mean 'switch'"),
            (["--slurm", "--config=configs/base_ml.py", "--runs=/shared"], "did you mean 'configs/base_lm.py'"),
            ([*SLURM, "--config.train.stesp=3"], "did you mean 'steps'"),
            ([*SLURM, "--config.train.steps=many"], "train.steps='many' in the command line is not an int"),
            ([*SKY, "--config.model.blocks.moe.ffn.select.kk=2"], "unknown key 'kk' in model.blocks.moe.ffn.select"),
            ([*SKY, "--config.optimizer.kind=adamv"], "did you mean 'adamw'"),
            ([*SLURM, "--workdir=/shared/x"], "--runs=/shared/runs does not go with --workdir=/shared/x"),
            # What is not for other machines.
            (["--slurm", "--list"], "--list needs no other machine"),
            (["--slurm", "--report", "--runs=/shared"], "--report needs no other machine"),
            ([*SKY, "--compile_for=v5e:16x16"], "--compile_for=v5e:16x16 needs no other machine"),
            ([*SLURM, "--processes=2"], "--processes does not go with the launcher"),
            ([*SLURM, "--fresh"], "--fresh would train again what is finished whenever"),
            # Places that the job's machines do not have.
            (["--slurm", RUN[0], "--runs=runs"], "--runs='runs' must be an absolute path that all machines see"),
            (["--sky=H100:8", RUN[0]], "--runs='' must be a bucket (gs://, s3:// or r2://), or an absolute path"),
            (["--slurm", RUN[0], "--runs=gs://bucket"], "--runs=gs://bucket: the nodes of a Slurm cluster mount no bucket"),
            (["--sky=H100:8", RUN[0], "--runs=ftp://x/y"], "--runs='ftp://x/y' must be a bucket"),
            (["--sky=H100:8", "--nodes=2", RUN[0], "--runs=s3://b"], "cannot write checkpoints together in a bucket of s3://"),
            ([*SKY, "--config.data.tokenizer=mine.json"], "data.tokenizer=mine.json is not in"),
            ([*SLURM, "--config.data.data_dir=tfds"], "data.data_dir=tfds is not in"),
            ([*SKY, "--config.init.source.kind=checkpoint", "--config.init.source.path=runs/x"], "init.source.path=runs/x is not in"),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("dry", [["--dry_run"], []], ids=["dry", "real"])
    def test_a_mistake_is_one_line_and_nothing_is_submitted(self, capsys, monkeypatch, arguments, message, dry):
        monkeypatch.setattr(launch, "_submit", None)
        assert launch.main([*arguments, *dry]) == 2
        out, err = capsys.readouterr()
        assert message in err
        assert (out, err.count("\n")) == ("", 1)

    def test_configs_that_would_not_be_sent_are_refused(self, tmp_path, capsys, monkeypatch):
        repository = tmp_path / "repository"
        (repository / "private").mkdir(parents=True)
        (repository / ".gitignore").write_text("private/\n")
        text = "from configs.small_lm import get_config\n"
        for file in ("new.py", "private/mine.py", "../outside.py"):
            (repository / file).write_text(text)
        subprocess.run(["git", "init", "-q"], cwd=repository, check=True)
        for module in (launch, jobs):
            monkeypatch.setattr(module, "REPOSITORY", repository)
        monkeypatch.chdir(tmp_path)

        def launched(place, config):
            status = launch.main([place, f"--config={config}", "--runs=/shared", "--dry_run"])
            return status, "".join(capsys.readouterr())

        status, message = launched("--sky=H100:8", "repository/private/mine.py")
        assert (status, "is ignored by git, and so not sent" in message) == (2, True)
        status, message = launched("--sky=H100:8", "outside.py")
        assert (status, "outside.py lies outside of" in message) == (2, True)
        # New files are sent. The path is that in the checkout, wherever the command was given.
        status, message = launched("--sky=H100:8", "repository/new.py")
        assert (status, "experiments.run --config=new.py --runs" in message) == (0, True)
        # A Slurm job sees what lies on its nodes.
        status, message = launched("--slurm", "outside.py")
        assert (status, f"experiments.run --config={tmp_path}/outside.py --runs" in message) == (0, True)

    @pytest.mark.parametrize(
        ("place", "words"),
        [("--sky=H100:8", r"no 'sky' here; pip install 'moejax\[launch\]'"), ("--slurm", "no 'sbatch' here")],
    )
    def test_a_program_that_is_not_there_is_named(self, tmp_path, capsys, monkeypatch, place, words):
        monkeypatch.setattr(launch.shutil, "which", lambda name: None)
        assert launch.main([place, *RUN]) == 2
        assert re.search(words, capsys.readouterr().err)

    @pytest.mark.parametrize("where", ["--runs", "--workdir", "MOEJAX_RUNS"])
    def test_a_run_itself_takes_no_bucket_and_says_who_does(self, where, capsys, monkeypatch, tmp_path):
        flag = [f"{where}=gs://bucket/x"] if where.startswith("--") else []
        monkeypatch.setenv("MOEJAX_RUNS", str(tmp_path) if flag else "gs://bucket/x")
        assert run.main([RUN[0], *flag]) == 2
        err = capsys.readouterr().err
        assert f"{where}=gs://bucket/x is a bucket; mount it and give the path, or let python -m experiments.launch" in err
        assert err.count("\n") == 1


def test_the_jobs_of_the_pages_are_right(capsys):
    page = (launch.REPOSITORY / "docs/meshes_and_pods.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith("python -m experiments.launch")]
    assert len(lines) == 4
    for line in lines:
        shown(capsys, *shlex.split(line.partition("#")[0])[3:])
