"""What reaches the terminal: text that can only be read, and one line for what the machine refuses."""

import errno
import os
import re
import threading
import warnings

import pytest
from matplotlib.figure import Figure
from rich.progress import Progress
from toy_studies import FakeFit, make_study

from experiments import plots, run, tables
from experiments.cache import Run
from experiments.execute import execute, finish
from experiments.progress import Board
from experiments.record import Outcome
from experiments.run import main
from experiments.study import Arm
from experiments.tables import Table
from experiments.terminal import PlainConsole, curves, make_console, one_line_each, say, show, trouble
from moejax.core.files import Damaged
from moejax.core.text import printable

# A title, a colour, a cleared screen, a bell, a carriage return, the one-byte form of ESC [, and a turned writing direction.
EVIL = "a\x1b]0;owned\x07b\x1b[31mc\x1b[2J\rd\x9b1me\u202ef\x08"
WRITTEN = r"a\x1b]0;owned\x07b\x1b[31mc\x1b[2J\rd\x9b1me\u202ef\x08"

# Rich itself drops the bell, the carriage return and the backspace.
SEEN = r"a\x1b]0;ownedb\x1b[31mc"


def harmless(text):
    return not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)


def test_what_a_terminal_would_obey_is_written_out():
    assert printable(EVIL) == WRITTEN
    assert printable("é ± ★ 模型 👩\u200d💻\ttab\n") == "é ± ★ 模型 👩\u200d💻\ttab\n"
    assert printable("\ud800") == r"\ud800"
    assert printable(printable(EVIL)) == printable(EVIL)


def test_names_notes_and_errors_of_a_study_reach_the_terminal_as_text(tmp_path, capsys):
    study = make_study(title=EVIL, arms=(*make_study().arms[:2], Arm("top2", make_study().arm("top2").overrides, note=EVIL)))
    console = make_console()
    outcome = execute(study, "cpu", runs=tmp_path / "runs", seeds=1, fit=FakeFit(), console=console)
    finish(outcome, tmp_path / "runs", tmp_path / "ledger", console)
    for table in tables.describe(study):
        show(console, table)
    show(console, Table(EVIL, (EVIL, "b"), ((EVIL, EVIL),), ("dim",)))
    say(console, EVIL)
    out = capsys.readouterr().out
    assert harmless(out)
    assert out.count(SEEN) >= 5


def test_live_progress_keeps_its_own_movements_and_nobody_elses(capsys):
    console = PlainConsole(force_terminal=True, width=160, color_system=None)
    with Board(console, len(EVIL)) as board:
        board.line(EVIL, 0, 4).finish(EVIL)
        assert isinstance(board._live, Progress)
    out = capsys.readouterr().out
    assert "\x1b[?25l" in out
    assert SEEN in out
    assert "owned\x07" not in out
    assert "\x1b[2J" not in out


def test_errors_and_warnings_are_one_harmless_line(capsys):
    assert main([f"--study={EVIL}"]) == 2
    err = capsys.readouterr().err
    assert harmless(err)
    assert err.count("\n") == 1
    with one_line_each():
        line = warnings.formatwarning(Damaged(f"log x\n {EVIL} is damaged"), Damaged, "file.py", 3)
    assert line == f"warning: log x {printable(' '.join(EVIL.split()))} is damaged\n"


def fault(number):
    return OSError(number, os.strerror(number), "some/file")


def wrapped(number):
    """As the thread that writes a checkpoint gives it: in words, or as the cause of another error."""
    try:
        try:
            raise fault(number)
        except OSError as error:
            raise ValueError("save failed") from error
    except ValueError as error:
        return error


FAULTS = {
    "full": fault(errno.ENOSPC),
    "wrapped": wrapped(errno.ENOSPC),
    "in words": ValueError("ABORTED: [tensorstore] No space left on device [os_error_code='28']"),
    "read only": fault(errno.EROFS),
    "gone": fault(errno.ENOENT),
}


@pytest.mark.parametrize("error", FAULTS.values(), ids=FAULTS)
def test_what_the_machine_refuses_is_one_line_and_status_1(tmp_path, monkeypatch, capsys, error):
    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setitem(run._MODES, "config", refuse)
    argv = ["--config=configs/base_lm.py", f"--runs={tmp_path}"]
    assert main(argv) == 1
    err = capsys.readouterr().err
    assert re.fullmatch(
        r"error: (No space left on device|Read-only file system|No such file or directory)(: some/file)?; the same .*\n", err
    )
    monkeypatch.setenv("MOEJAX_TRACEBACK", "1")
    with pytest.raises(type(error)):
        main(argv)


def test_other_errors_keep_their_traceback(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise ValueError("a fault of the program")

    monkeypatch.setitem(run._MODES, "config", fail)
    with pytest.raises(ValueError, match="a fault of the program"):
        main(["--config=configs/base_lm.py", f"--runs={tmp_path}"])
    assert trouble(ValueError("x")) == ""


def test_a_thread_that_finds_the_disk_full_says_nothing_and_any_other_fault_is_shown(capsys):
    def work(error):
        raise error

    with one_line_each():
        for error in (fault(errno.ENOSPC), KeyError("a bug")):
            thread = threading.Thread(target=work, args=(error,), name="writer")
            thread.start()
            thread.join()
    err = capsys.readouterr().err
    assert "No space" not in err
    assert err.startswith("in thread writer:\nTraceback")
    assert "KeyError: 'a bug'" in err


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nothing"])
@pytest.mark.parametrize("argv", [["--study=switch"], ["--config=configs/base_lm.py"], ["--report"]], ids=str)
def test_runs_that_cannot_be_written_are_told_before_anything_is_done(tmp_path, monkeypatch, capsys, place, argv):
    (tmp_path / "file").write_text("")
    assert main([*argv, f"--runs={tmp_path / place}"]) == 2
    out, err = capsys.readouterr()
    assert re.fullmatch(r"error: --runs=\S+ cannot be written in \(.*\); give another with --runs=DIR\n", err)
    assert out == ""
    monkeypatch.setenv("MOEJAX_RUNS", str(tmp_path / place))
    assert main(argv) == 2
    assert capsys.readouterr().err.startswith("error: MOEJAX_RUNS=")


@pytest.mark.parametrize("width", [80, 100, 120])
def test_tables_break_no_word_and_lose_no_column(width, capsys):
    """Those that are too wide follow each other, each with the first column."""
    metrics = ("eval/bits_per_byte", "eval/stats/drop_rate", "eval/stats/max_violation")
    columns = ("arm", "seeds", *metrics, "params", "active", "tokens/s", "drop_rate", "backend")
    rows = tuple(
        (arm, "3 (3 cached)", *["1.8463 ± 0.0122"] * 3, "1.23M", "346k", "12.3k", "1.2 %", "grouped")
        for arm in ("dense", "switch")
    )
    sentence = "Switch beats dense at equal compute, and does so with fewer dropped tokens than before"
    long = Table("Claims", ("claim", "statement", "verdict"), ((sentence, sentence, "inconclusive: too few seeds"),))
    console = PlainConsole(width=width, color_system=None)
    show(console, Table("Arms", columns, rows, notes=("drop_rate: of what",)))
    show(console, long)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= width
    words = out.split()
    for text in (*columns, *rows[0]):
        assert set(text.split()) <= set(words), text
    assert set(sentence.split()) <= set(words)
    assert words.count("dense") == words.count("arm") + 2  # the claim says it twice
    assert "drop_rate: of what" in out


def test_tensorboard_is_named_only_where_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", {}.get)
    assert curves(tmp_path) == ""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "tensorboard")
    assert curves(tmp_path) == f"tensorboard --logdir={tmp_path}"


def test_backends_are_names():
    def run(**metrics):
        return Run("a", 0, {f"stats/moe.{name}/backend": value for name, value in metrics.items()})

    assert tables.backend_of(run(x=0.0, y=0.0)) == "reference"
    assert tables.backend_of(run(x=3.0, y=2.0)) == "grouped, capacity"
    assert tables.backend_of(Run("a", 0, {})) == ""
    table = tables.summary_of("a", {0: run(x=3.0)})
    assert ("backend", "grouped") in table.rows
    assert any(note.startswith("backend: ") for note in table.notes)


def test_a_layer_has_one_name():
    assert plots.layer_name("stack.repeats.1_moe.ffn.0") == "moe ffn 0"
    assert plots.layer_name("blocks.2_moe.mixer") == "blocks moe mixer"


def test_every_point_of_a_short_curve_is_in_the_picture(tmp_path):
    """The first loss of a run of four steps is the highest."""
    history = [{"step": step, "train/loss": loss} for step, loss in ((1, 9.0), (2, 5.0), (3, 4.0), (4, 3.5))]
    study = make_study()
    found = Outcome(study, "smoke", "", {"dense": {0: Run("dense", 0, {}, history)}}, {"dense": study.base}, {})
    axes = Figure().subplots()
    plots._curve_panel(axes, found, "train/loss")
    low, high = axes.get_ylim()
    assert low < 3.5
    assert high > 9.0
