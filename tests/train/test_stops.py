"""Processes that are killed or told to stop, for real."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from training_harness import TinyText, run_tiny

from moejax.train import load
from moejax.train.stops import Interrupted, Signals

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


@pytest.fixture
def old_handler():
    """What a signal did before: it is listed."""
    calls = []
    old = {signum: signal.signal(signum, lambda signum, _: calls.append(signum)) for signum in Signals.WATCHED}
    yield calls
    for signum, handler in old.items():
        signal.signal(signum, handler)


def test_a_signal_is_noted_once_the_next_does_what_it_did_before_and_handlers_come_back(old_handler):
    with Signals() as signals:
        signals.defer()
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGTERM
        assert old_handler == []
        # Of either kind.
        os.kill(os.getpid(), signal.SIGINT)
        assert old_handler == [signal.SIGINT]
    os.kill(os.getpid(), signal.SIGTERM)
    assert old_handler == [signal.SIGINT, signal.SIGTERM]


def test_a_signal_before_anything_can_be_lost_ends_the_run_where_it_is(old_handler):
    went_on = []

    def listen():
        with Signals():
            os.kill(os.getpid(), signal.SIGTERM)
            went_on.append(True)

    with pytest.raises(Interrupted) as stop:
        listen()
    assert not went_on
    assert (stop.value.code, stop.value.step) == (143, None)
    assert old_handler == []


def test_signals_reach_who_listened_before_too(old_handler):
    """An event loop is told of signals through a pipe, and is again when the block is left."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = signal.set_wakeup_fd(write)
    try:
        with Signals() as signals:
            signals.defer()
            os.kill(os.getpid(), signal.SIGTERM)
            assert os.read(read, 1) == bytes([signal.SIGTERM])
        os.kill(os.getpid(), signal.SIGINT)
        assert os.read(read, 1) == bytes([signal.SIGINT])
    finally:
        signal.set_wakeup_fd(before)
        os.close(read)
        os.close(write)


def test_outside_of_the_main_thread_signals_keep_their_meaning(old_handler):
    def work():
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.received is None

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert old_handler == [signal.SIGTERM]


@pytest.mark.parametrize("signum", Signals.WATCHED)
def test_a_signal_while_data_load_stops_at_once_and_says_so(tmp_path, capsys, signum):
    class Slow(TinyText):
        def __next__(self):
            os.kill(os.getpid(), signum)
            time.sleep(60)

    begun = time.monotonic()
    with pytest.raises(Interrupted) as stop:
        run_tiny(tmp_path, make_iterator=Slow)
    assert time.monotonic() - begun < 30
    assert stop.value.code == 128 + signum
    assert (
        capsys.readouterr().err
        == f"tiny: stopped by signal {int(signum)} before its first step; nothing is lost, the same command begins again\n"
    )


def test_a_signal_while_the_step_compiles_stops_before_it_is_taken(tmp_path, capsys):
    def progress(report):
        if report.phase == "compile":
            os.kill(os.getpid(), signal.SIGTERM)

    class NoMore(TinyText):
        def __next__(self):
            assert self.done == 0, "a step was taken"
            return super().__next__()

    with pytest.raises(Interrupted) as stop:
        run_tiny(tmp_path, make_iterator=NoMore, progress=progress)
    assert (stop.value.code, stop.value.step) == (143, 0)
    assert "after step 0 of 8; the same command begins again\n" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("signum", Signals.WATCHED)
def test_a_second_signal_ends_a_process_that_is_busy_in_compiled_code(signum):
    """The main thread computes hashes for minutes, in one call that Python cannot interrupt."""
    code = (
        "import hashlib, threading; from moejax.train.stops import Signals\n"
        "with Signals() as signals:\n"
        "    signals.defer()\n"
        "    threading.Timer(0.5, print, ('ready',), {'flush': True}).start()  # when the call is under way\n"
        "    hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signum)
        time.sleep(1)
        assert process.poll() is None
        process.send_signal(signum)
        assert process.wait(timeout=30) == 128 + signum
