"""Worker processes: what they train is what one after the other trains, and nothing of theirs outlives the command."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toy_fits import Mistaken, Slow, Sometimes, Started
from toy_studies import FakeFit, make_study

from experiments import claims
from experiments.execute import execute, execute_config
from experiments.schedule import RunsFailed
from experiments.study import Preset
from experiments.terminal import PlainConsole
from moejax.core.errors import ConfigError

pytestmark = pytest.mark.slow  # workers import JAX: seconds each
HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]


def alive(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def trained(folder):
    """`(pid, arm, seed)` of what a `Slow` trained, in order of their beginning."""
    lines = (folder / "log").read_text().splitlines()
    return [(int(pid), arm, int(seed)) for pid, what, arm, seed in map(str.split, lines) if what == "began"]


def wait_for(what, seconds=60):
    limit = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < limit
        time.sleep(0.01)


def plain_console():
    return PlainConsole(width=160, file=io.StringIO())


def lines_of(console):
    return sorted(console.file.getvalue().splitlines())


def test_side_by_side_gives_and_tells_what_one_after_the_other_does(tmp_path):
    consoles = plain_console(), plain_console()
    serial = execute(make_study(), "cpu", runs=tmp_path / "serial", fit=FakeFit(), console=consoles[0])
    outcome = execute(make_study(), "cpu", runs=tmp_path / "runs", fit=Slow(tmp_path), jobs=2, console=consoles[1])
    assert lines_of(consoles[0]) == lines_of(consoles[1])
    assert len(lines_of(consoles[1])) == 24
    assert outcome.runs.keys() == serial.runs.keys()
    for arm, seeds in serial.runs.items():
        assert {seed: run.metrics for seed, run in outcome.runs[arm].items()} == {
            seed: run.metrics for seed, run in seeds.items()
        }
        assert not any(run.cached for run in outcome.runs[arm].values())
    assert [v.word for v in outcome.verdicts] == [v.word for v in serial.verdicts]
    # All in two processes, neither of them this one; each goes on with the arm that it has compiled.
    done = trained(tmp_path)
    workers = {pid for pid, *_ in done}
    assert len(workers) == 2
    assert os.getpid() not in workers
    assert len(done) == 12
    assert len({(pid, arm) for pid, arm, _ in done}) <= 4, "three arms, one of them shared at the end"
    wait_for(lambda: not any(map(alive, workers)), 10)
    again = execute(make_study(), "cpu", runs=tmp_path / "runs", fit=Slow(tmp_path), jobs=2)
    assert all(run.cached for seeds in again.runs.values() for run in seeds.values())
    assert len(trained(tmp_path)) == 12


def test_a_failed_run_is_told_and_the_others_go_on(tmp_path, capsys):
    fit = Sometimes(tmp_path, {"dense seed 1": "raise", "top2 seed 0": "kill"})
    with pytest.raises(RunsFailed, match=r"^2 runs failed, and all others have ended: "):
        execute(make_study(), "cpu", runs=tmp_path / "runs", fit=fit, jobs=2)
    err = capsys.readouterr().err
    assert "failed: top2 seed 0: killed (signal 9: out of memory?)\n" in err
    (line,) = [line for line in err.splitlines() if line.startswith("failed: dense seed 1: ")]
    assert "ZeroDivisionError: not today (" in line
    assert "toy_fits.py:" in line
    file = Path(line.rpartition("the whole traceback is in ")[2])
    assert "in __call__" in file.read_text()
    assert len({(arm, seed) for _, arm, seed in trained(tmp_path)}) == 12
    # The same command tries them again, and only them; the claim of the killed worker is in nobody's way.
    outcome = execute(make_study(), "cpu", runs=tmp_path / "runs", fit=Slow(tmp_path), jobs=2)
    assert [(arm, seed) for arm, seeds in outcome.runs.items() for seed, run in seeds.items() if not run.cached] == [
        ("dense", 1),
        ("top2", 0),
    ]
    assert not file.exists()


def test_a_config_that_cannot_be_trained_ends_the_command(tmp_path):
    with pytest.raises(ConfigError, match=r"^no such split in eval\.split$"):
        execute(make_study(), "cpu", runs=tmp_path / "runs", fit=Mistaken(tmp_path), jobs=2)


def test_a_start_is_trained_once_and_nobody_waits_for_it_who_has_other_work(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "POLL", 0.05)
    monkeypatch.setenv("TOY_STEP", "0.01")
    from test_starts import make

    outcome = execute(make(presets={"smoke": Preset({"train.steps": 4}, looks=(1,), headline_looks=(1,)), "cpu": Preset()}), "cpu",
                      runs=tmp_path / "runs", seeds=1, fit=Started(tmp_path), jobs=3)  # fmt: skip
    assert {arm: list(seeds) for arm, seeds in outcome.runs.items()} == {
        arm: [0] for arm in ("switch", "tuned", "moved", "longer")
    }
    begun = [line.split()[2] for line in (tmp_path / "log").read_text().splitlines() if " finished " in line]
    assert sorted(begun) == ["init.source", "longer", "moved", "switch", "tuned"]


def test_several_seeds_of_a_config_have_folders_of_their_own(tmp_path):
    found = execute_config(
        "x", make_study().base, runs=tmp_path / "runs", workdir=tmp_path / "here", seeds=3, fit=Slow(tmp_path), jobs=2
    )
    assert sorted(found) == [0, 1, 2]
    assert [found[seed].path for seed in range(3)] == [tmp_path / "here" / f"seed{seed}" for seed in range(3)]


SCRIPT = """
import sys
sys.path.insert(0, {here!r})
from pathlib import Path
from toy_fits import Slow
from toy_studies import make_study
from experiments.execute import execute
execute(make_study(), "cpu", runs=Path({root!r}) / "runs", fit=Slow({root!r}), jobs=2)
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_the_command_ends_its_workers(tmp_path, monkeypatch, signum):
    monkeypatch.setenv("TOY_STEP", "0.05")
    script = SCRIPT.format(here=str(HERE), root=str(tmp_path))
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY
    ) as command:
        wait_for(lambda: (tmp_path / "log").exists() and (tmp_path / "log").read_text().count("step") > 3)
        workers = {pid for pid, *_ in trained(tmp_path)}
        assert all(map(alive, workers))
        command.send_signal(signum)
        began = time.monotonic()
        _, err = command.communicate(timeout=30)
        assert time.monotonic() - began < 10
    wait_for(lambda: not any(map(alive, workers)), 10)
    if signum == signal.SIGKILL:
        assert command.returncode == -signal.SIGKILL
    else:
        assert command.returncode == 128 + signum
        assert err.count("\n") == 1, err
        assert err.startswith(f"stopped by signal {int(signum)}: ")
        assert err.endswith("; the same command goes on from there\n")
        assert "seed 0 after step" in err
    claimed = list((tmp_path / "runs").rglob("*.claim*"))
    assert not claimed
