"""Processes that are killed or told to stop, for real."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from moejax.train import load
from moejax.train.stops import Signals

ROOT = Path(__file__).parents[2]
CHANGES = {"train__steps": 40, "train__log_every": 3, "eval__every": 10, "checkpoint__every": 4}


def start(workdir, kill_at=0, delay=0.0):
    """The harness in a process of its own: one device, no shape checks, as a user runs it."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [
        sys.executable,
        str(ROOT / "tests/training_harness.py"),
        str(workdir),
        json.dumps(CHANGES),
        str(kill_at),
        str(delay),
    ]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def finish(process):
    """Its exit code and what it said; a slow disk makes Orbax's saves warn through absl, which is not about stopping."""
    _, errors = process.communicate(timeout=300)
    return process.returncode, "".join(line for line in errors.splitlines(True) if not line.startswith("WARNING:absl:"))


def assert_same_end(a, b):
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()
    (_, variables_a, _), (_, variables_b, _) = load(a), load(b)
    assert variables_a.keys() == variables_b.keys()
    flat = lambda tree: {"/".join(k): np.asarray(v) for k, v in _leaves(tree)}  # noqa: E731
    left, right = flat(variables_a), flat(variables_b)
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)
    results = [json.loads((w / "result.json").read_text()) for w in (a, b)]
    assert results[0]["metrics"] == results[1]["metrics"]


def _leaves(tree, path=()):
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, (*path, key))
    else:
        yield path, tree


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("whole")
    assert finish(start(workdir)) == (0, "")
    return workdir


@pytest.mark.slow
def test_a_run_killed_twice_at_random_ends_with_the_same_bits(whole, tmp_path):
    first = random.randrange(1, 25)
    # Between the first kill's step and the end: never before it, so that it is reached again.
    second = random.randrange(first, 40)
    print(f"killed before steps {first + 1} and {second + 1}")
    for kill_at in (first, second):
        assert finish(start(tmp_path, kill_at))[0] == -signal.SIGKILL
    assert finish(start(tmp_path)) == (0, "")
    assert_same_end(tmp_path, whole)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_next_process_goes_on(whole, tmp_path, signum):
    process = start(tmp_path, delay=0.1)
    while not (tmp_path / "started").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signum)
    code, errors = finish(process)
    assert code == 128 + signum
    (line,) = errors.splitlines()
    assert f"stopped by signal {int(signum)}" in line
    (newest,) = [max(int(p.name) for p in (tmp_path / "checkpoints").iterdir())]
    assert f"after step {newest} of 40; checkpoint saved in {tmp_path}/checkpoints/{newest}" in line
    assert not (tmp_path / "result.json").exists()
    assert finish(start(tmp_path)) == (0, "")
    assert_same_end(tmp_path, whole)


def test_signals_are_noted_once_and_handlers_come_back():
    calls = []
    old = signal.signal(signal.SIGTERM, lambda *_: calls.append("old"))
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.received == signal.SIGTERM
            assert calls == []
            os.kill(os.getpid(), signal.SIGTERM)
            assert calls == ["old"], "a second signal does what it did before"
        os.kill(os.getpid(), signal.SIGTERM)
        assert calls == ["old", "old"]
    finally:
        signal.signal(signal.SIGTERM, old)
