"""Claims: one holder at a time, whatever the clocks say and however a holder ended; two commands on one folder share its runs."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from toy_studies import SOURCE

from experiments import claims
from experiments.claims import Busy, claimed

HERE = Path(__file__).parent


def gone(file, **changes):
    """A claim whose holder ran elsewhere and is gone for ever."""
    file.parent.mkdir(parents=True, exist_ok=True)
    what = {"token": "old", "machine": "another", "pid": 1, "start": "1", "lease": 60.0, **changes}
    file.write_text(json.dumps(what))
    os.utime(file, (time.time() - 61, time.time() - 61))


def test_a_claim_is_held_by_one_and_leaves_nothing(tmp_path):
    file = tmp_path / "below" / "x.claim"
    with claimed(file, "busy"), pytest.raises(Busy, match="busy"), claimed(file, "busy"):
        pass
    with claimed(file, "busy"):
        pass
    assert list(file.parent.iterdir()) == []


def test_a_claim_that_nobody_renews_is_taken_over(tmp_path):
    file = tmp_path / "x.claim"
    gone(file)
    with claimed(file, "busy"), pytest.raises(Busy), claimed(file, "busy"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("changes", [{"lease": 90.0}, {"machine": "here"}], ids=["a longer lease", "a holder that lives"])
def test_a_claim_that_is_not_over_is_left_alone(tmp_path, changes):
    if "machine" in changes:  # this very process, which has been asleep for a minute
        changes = {"machine": claims._machine(), "pid": os.getpid(), "start": claims._start(os.getpid())}
    gone(tmp_path / "x.claim", **changes)
    with pytest.raises(Busy), claimed(tmp_path / "x.claim", "busy"):
        pass


def test_a_holder_of_this_machine_that_was_killed_is_known_at_once(tmp_path):
    code = "import sys, time; from pathlib import Path; from experiments.claims import claimed\nwith claimed(Path(sys.argv[1]), 'busy'): print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "x.claim")], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(Busy), claimed(tmp_path / "x.claim", "busy"):
            pass
        other.kill()
    with claimed(tmp_path / "x.claim", "busy"):
        pass


def test_the_age_of_a_claim_is_that_by_the_clock_of_its_file_system(tmp_path, monkeypatch):
    """This machine's own clock is an hour off."""
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 3600)
    gone(tmp_path / "x.claim")
    os.utime(tmp_path / "x.claim")
    with pytest.raises(Busy), claimed(tmp_path / "x.claim", "busy"):
        pass


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"token": "x"}'])
def test_a_claim_that_was_never_written_is_over_after_a_lease(tmp_path, text):
    file = tmp_path / "x.claim"
    file.write_text(text)
    with pytest.raises(Busy), claimed(file, "busy"):
        pass
    os.utime(file, (time.time() - 61, time.time() - 61))
    with claimed(file, "busy"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_of_many_takers_of_a_dead_claim_one_wins(tmp_path):
    file, wins = tmp_path / "x.claim", []
    for round in range(20):
        gone(file, token=f"old{round}")
        start, end = threading.Barrier(8), threading.Barrier(8)

        def take(round=round, start=start, end=end):
            start.wait()
            try:
                with claimed(file, "busy"):
                    wins.append(round)
                    end.wait()
            except Busy:
                end.wait()

        threads = [threading.Thread(target=take) for _ in range(8)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert wins == list(range(20))
    assert list(tmp_path.iterdir()) == []


def test_a_taker_that_comes_too_late_does_not_hurt_the_newer_claim(tmp_path, monkeypatch):
    """It saw the claim of a dead holder; another one took that over, ended, and a third has the claim, before it could act."""
    file = tmp_path / "x.claim"
    gone(file)
    old = claims._newest(file)
    with claimed(file, "busy"):
        pass
    newest, asked = claims._newest, []

    def late(root):
        asked.append(root)
        return old if len(asked) == 1 else newest(root)

    with claimed(file, "busy") as check:
        monkeypatch.setattr(claims, "_newest", late)
        with pytest.raises(Busy), claimed(file, "busy"):
            pass
        check()
    assert list(tmp_path.iterdir()) == []


def test_a_claim_is_renewed_and_its_loss_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEJAX_LEASE", "0.3")
    file = tmp_path / "x.claim"
    with claimed(file, "busy") as check:
        before = file.stat().st_mtime_ns
        time.sleep(0.2)
        assert file.stat().st_mtime_ns > before
        check()
        # It slept for longer than its lease, and another one took over.
        gone(claims._successor(file, claims._newest(file).token))
        time.sleep(0.2)
        with pytest.raises(Busy, match=r"did not answer for 0\.3 s, and another one took over"):
            check()
    assert len(list(tmp_path.iterdir())) == 2, "the claim is the other one's"


# A command on a toy study whose runs take a while, and go on from a file that counts their steps.
COMMAND = """
import json, sys, time
from pathlib import Path
sys.path.insert(0, {here!r})
from toy_studies import FakeFit, Report
from experiments import execute, record, run, study
root = Path({root!r})
study.ROOT, record.LEDGER = root / "studies", root / "ledger"
class Slow(FakeFit):
    def __call__(self, config, **given):
        folder = Path(given["workdir"])
        folder.mkdir(parents=True, exist_ok=True)
        steps = folder / "steps"
        for step in range(len(steps.read_text()) if steps.exists() else 0, 10):
            with (root / "steps").open("a") as log:
                log.write(f"{{sys.argv[1]}} {{folder.name}} {{step}}\\n")
            with steps.open("a") as file:
                file.write("x")
            given["progress"](Report(given["label"], step, 10, "train", 1.0, 1.0, 1.0))
            time.sleep(0.04)
        return super().__call__(config, **given)
execute._prepared_fit = lambda *args: Slow()
execute._ask_canary = execute._warn_of_unmatched = lambda *args: None
sys.exit(run.main(["--study=toy", "--seeds=2", f"--runs={{root}}/runs"]))
"""


@pytest.fixture
def start(tmp_path):
    (tmp_path / "studies" / "family").mkdir(parents=True)
    (tmp_path / "studies" / "family" / "toy.py").write_text(SOURCE.format(slug="toy"))
    started = []

    def start(name):
        code = COMMAND.format(here=str(HERE), root=str(tmp_path))
        started.append(
            subprocess.Popen([sys.executable, "-c", code, name], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def steps(folder):
    """`[run][step]` -> who did it."""
    found = {}
    for line in (folder / "steps").read_text().splitlines():
        who, run, step = line.split()
        found.setdefault(run, {}).setdefault(int(step), []).append(who)
    return found


@pytest.mark.slow
def test_two_commands_on_one_folder_train_disjoint_runs_and_tell_the_same(start, tmp_path):
    both = [start(name) for name in "ab"]
    out = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], out
    done = steps(tmp_path)
    assert len(done) == 6
    for run, who in done.items():
        assert sorted(who) == list(range(10))
        assert len({name for names in who.values() for name in names}) == 1, f"{run} was trained by one of them"
    assert {who[0][0] for who in done.values()} == {"a", "b"}
    assert all(len(names) == 1 for who in done.values() for names in who.values())
    tables = [text[text.index("Claims") : text.index("wrote")] for text in out]
    assert tables[0] == tables[1]
    assert not list((tmp_path / "runs").rglob("*.claim*"))


@pytest.mark.slow
def test_the_run_of_a_command_that_was_killed_is_taken_over_where_it_was(start, tmp_path):
    killed = start("a")
    while not (tmp_path / "steps").exists():
        time.sleep(0.01)
    other = start("b")
    while "b" not in (tmp_path / "steps").read_text():
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    begun = steps(tmp_path)
    out = other.communicate(timeout=120)[0]
    assert other.returncode == 0, out
    done = steps(tmp_path)
    assert len(done) == 6
    assert all(sorted(who) == list(range(10)) and all(len(names) == 1 for names in who.values()) for who in done.values())
    shared = [run for run, who in done.items() if {name for names in who.values() for name in names} == {"a", "b"}]
    assert len(shared) <= 1
    unfinished = [run for run, who in begun.items() if len(who) < 10 and who[min(who)] == ["a"]]
    assert shared == unfinished
    assert not list((tmp_path / "runs").rglob("*.claim*"))
