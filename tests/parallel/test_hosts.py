"""Several processes: where they are, what they agree on, and a run that loses them again and again."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import worker

from moejax.core.errors import ConfigError
from moejax.parallel import hosts
from moejax.parallel.hosts import Group, find

ROOT = Path(__file__).parents[2]
# No process outlives another by more than this many seconds: none of them would notice a lost one by heartbeats before.
HEARTBEAT = 20


@pytest.fixture
def nowhere(monkeypatch):
    """An environment that names no other process."""
    for name in (*hosts.ENVIRONMENT.values(), "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_a_process_alone_needs_nothing(nowhere):
    assert find() is None
    assert hosts.start() == 1
    assert hosts.gather({"a": 1}) == [{"a": 1}]
    assert hosts.share("x") == "x"
    assert hosts.is_first()


def test_places_come_from_arguments_then_the_environment_then_the_cluster(nowhere):
    nowhere.setenv("SLURM_STEP_NODELIST", "n[1-2]")
    nowhere.setenv("SLURM_STEP_NUM_TASKS", "2")
    assert find() == Group("auto")
    nowhere.setenv("MOEJAX_COORDINATOR", "10.0.0.1:8476")
    nowhere.setenv("MOEJAX_PROCESSES", "4")
    nowhere.setenv("MOEJAX_PROCESS", "3")
    assert find() == Group("10.0.0.1:8476", 4, 3)
    assert find("n7:80", process=0) == Group("n7:80", 4, 0)
    nowhere.setenv("MOEJAX_COORDINATOR", "auto")
    assert find() == Group("auto")


def test_hosts_of_a_tpu_slice_are_found_and_single_ones_stay_alone(nowhere):
    nowhere.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    nowhere.setenv("SLURM_STEP_NODELIST", "n1")
    assert find() is None
    nowhere.setenv("TPU_WORKER_HOSTNAMES", "t0,t1,t2,t3")
    assert find() == Group("auto")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coordinator": "n1:80"}, r"several processes need .*; got coordinator=n1:80, but no processes \(MOEJAX_PROCESSES\)"),
        ({"process": 1}, r"got process=1, but no coordinator \(MOEJAX_COORDINATOR\)"),
        ({"coordinator": "n1", "processes": 2, "process": 0}, "coordinator='n1' must be host:port of process 0"),
        ({"coordinator": "n1:80", "processes": 2, "process": 2}, "process=2 must lie between 0 and 1, since processes=2"),
    ],
)
def test_half_a_place_is_refused(nowhere, arguments, message):
    with pytest.raises(ConfigError, match=message):
        find(**arguments)


def test_a_coordinator_that_does_not_answer_is_named(nowhere):
    address = f"127.0.0.1:{free_port()}"
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=rf"process 1 of 2: nobody answers at coordinator={address} after 0.3 s"):
        hosts.start(address, 2, 1, timeout=0.3)
    assert time.monotonic() - began < 5


def test_a_port_that_is_taken_is_named(nowhere):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=rf"coordinator='{address}': port .* is taken on process 0"):
            hosts.start(address, 2, 0)


def test_devices_are_simulated_only_before_jax_starts():
    jax.devices()
    hosts.simulate(8)
    with pytest.raises(ConfigError, match="devices=4 comes too late: JAX has started with 8"):
        hosts.simulate(4)
    with pytest.raises(ConfigError, match="devices=0 is not a number of devices"):
        hosts.simulate(0)


def test_the_command_line_says_where_a_run_computes_and_that_does_not_make_it_another_run():
    from experiments import cache, flags, overrides

    options = flags.parse(
        ["--config=configs/base_lm.py", "--config.mesh=data=2,expert=4", "--config.exchange.kind=ring", "--devices=8"]
    )
    assert options.devices == 8
    _, config = flags.load_config(options.config)
    before = cache.key(config, 0)
    overrides.apply(config, {k: overrides.parse(config, k, v, "") for k, v in options.overrides.items()}, "the command line")
    assert config.mesh == "data=2,expert=4"
    assert config.exchange.kind == "ring"
    assert cache.key(config, 0) == before
    with pytest.raises(ConfigError, match="--devices=0 is not a number of devices"):
        flags.parse(["--devices=0"])
    with pytest.raises(ConfigError, match="--devices=8 does not go with --list"):
        flags.parse(["--list", "--devices=8"])


# What follows runs for real: two processes with two devices each.


def free_port():
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


class Pair:
    """Two processes of a run, from its start (or its newest checkpoint)."""

    def __init__(self, workdir, changes, kill_at=(0, 0), delay=0.0):
        environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": worker.FLAGS,
            "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "MOEJAX_COORDINATOR": f"127.0.0.1:{free_port()}",
            "MOEJAX_PROCESSES": "2",
            "MOEJAX_HEARTBEAT": str(HEARTBEAT),
            "MOEJAX_JOIN_TIMEOUT": "120",
        }
        self.workdir = workdir
        (workdir / "started").unlink(missing_ok=True)
        self.processes = [
            subprocess.Popen(
                [
                    sys.executable,
                    str(ROOT / "tests/parallel/worker.py"),
                    workdir,
                    json.dumps(changes),
                    "2",
                    str(kill),
                    str(delay),
                ],
                env=environment | {"MOEJAX_PROCESS": str(i)},
                stderr=subprocess.PIPE,
                text=True,
            )
            for i, kill in enumerate(kill_at)
        ]

    def wait_for_a_step(self):
        while not (self.workdir / "started").exists():
            assert all(process.poll() is None for process in self.processes)
            time.sleep(0.02)

    def finish(self):
        """Exit codes, what each process said on stderr, and the seconds by which the second outlived the first to end."""
        ended = []
        while len(ended) < 2:
            ended += [time.monotonic() for p in self.processes if p.poll() is not None][len(ended) :]
            time.sleep(0.05)
        said = [process.communicate()[1] for process in self.processes]
        return [process.returncode for process in self.processes], said, ended[1] - ended[0]


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def checkpoints(workdir):
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


@pytest.mark.slow
def test_a_run_of_two_processes_is_stopped_killed_and_damaged_and_ends_as_if_nothing_had_happened(tmp_path):
    """Experts lie on both processes, so that every step needs both; the end is reached on another mesh by one process."""
    workdir, whole = tmp_path / "run", tmp_path / "whole"
    workdir.mkdir()
    changes = {"mesh": "ep", "checkpoint__keep": 3}

    # A signal to one process stops both, at the same step, after a checkpoint.
    pair = Pair(workdir, changes, delay=0.3)
    pair.wait_for_a_step()
    pair.processes[1].send_signal(signal.SIGTERM)
    codes, said, _ = pair.finish()
    assert codes == [128 + signal.SIGTERM] * 2, said
    (stopped,) = {int(name) for name in checkpoints(workdir)} - {4, 8}
    assert f"stopped by signal {int(signal.SIGTERM)} after step {stopped} of 12" in said[0]
    assert "stopped by signal" not in said[1], "the first process speaks for all"

    # One process dies in the middle of a step: the other leaves within bounded time and says where to go on.
    codes, said, seconds = Pair(workdir, changes, kill_at=(0, 10)).finish()
    assert codes[1] == -signal.SIGKILL, said
    assert seconds < 3 * HEARTBEAT
    # On a busy machine JAX's own watchdog may be the first to notice; it aborts the process and says so.
    assert codes[0] in (75, -signal.SIGABRT), said
    if codes[0] == 75:
        assert "process 0 of 2 has lost another one near step 1" in said[0]
        assert f"the newest checkpoint is {workdir}/checkpoints/8" in said[0]
    else:
        assert "JAX distributed service detected fatal errors" in said[0]

    # The newest checkpoint is damaged: it is moved aside once, and both go on from the one before. Then both are killed.
    victim = max((f for f in (workdir / "checkpoints/8/variables").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 0xFF
    victim.write_bytes(content)
    codes, said, _ = Pair(workdir, changes, kill_at=(9, 9)).finish()
    assert -signal.SIGKILL in codes, said
    assert set(codes) <= {-signal.SIGKILL, 75, -signal.SIGABRT}
    assert "8.corrupt" in checkpoints(workdir)
    assert "8.corrupt-2" not in checkpoints(workdir)
    assert said[0].count("is damaged") == 1
    assert "is damaged" not in said[1]

    # One process, with other devices, goes on to the end. The run that nothing disturbed had one device.
    result = worker.run(workdir, mesh="data=4,fsdp=2")
    undisturbed = worker.run(whole)
    assert [line["step"] for line in lines(workdir)] == list(range(1, 13))
    for line, expected in zip(lines(workdir), lines(whole), strict=True):
        np.testing.assert_allclose(line["train/loss"], expected["train/loss"], rtol=1e-4)
        np.testing.assert_allclose(line["train/grad_norm"], expected["train/grad_norm"], rtol=1e-3)
    assert result.metrics.keys() == undisturbed.metrics.keys()
    np.testing.assert_allclose(result.metrics["eval/loss"], undisturbed.metrics["eval/loss"], rtol=1e-4)
    assert result.history[0]["train/loss"] > 1.05 * result.history[-1]["train/loss"]
