"""The benches: tiny runs of every one, their tables and files, what they refuse, and that `choose` agrees with what was measured."""

import dataclasses
import json
from pathlib import Path

import pytest

from experiments.bench import __main__ as command
from experiments.bench import dispatch, memory, router, tiny
from experiments.bench.table import FORWARD, Bar, Outcome
from experiments.bench.timing import Timing

SMALL = dict(n=16, d=8, f=16, e=4)
RESULTS = Path(command.__file__).parent / "results"


def small(shape: dispatch.Shape) -> dispatch.Shape:
    return dataclasses.replace(shape, **SMALL)


@pytest.fixture
def tiny_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DISPATCH", "DECODE", "SCALING"):
        monkeypatch.setattr(dispatch, name, tuple(small(s) for s in getattr(dispatch, name)))
    monkeypatch.setattr(memory, "SHAPES", {"reference": small(memory.SHAPES["reference"])})
    monkeypatch.setattr(router, "SHAPES", {"e8": router.Shape("e8", n=16, d=8, e=4, k=1)})
    monkeypatch.setattr(tiny, "SHAPES", {"peer4096": tiny.Shape("peer4096", n=8, d=16, p=2, side=4)})


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_shapes")
@pytest.mark.parametrize(
    ("bench", "case"),
    [("dispatch", "reference"), ("dispatch", "skewed"), ("dispatch", "few capped"), ("decode", "n8"), ("scaling", "e8")]
    + [("router", "e8"), ("tiny", "peer4096")],
)
def test_a_bench_prints_a_table_and_writes_json_and_a_plot(
    bench: str, case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([bench, f"--cases={case}", "--repeats=3", f"--out={tmp_path}"]) == 0
    result = json.loads((tmp_path / f"{bench}.json").read_text())
    (outcome,) = result["cases"]
    assert outcome["name"] == case
    assert outcome["ratios"][FORWARD][outcome["limit"]] == 1
    assert all(t["median"] > 0 for rows in outcome["timings"].values() for t in rows.values())
    assert (tmp_path / f"{bench}.png").stat().st_size > 5000
    assert case in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_shapes")
def test_ragged_dot_is_a_peer(tmp_path: Path) -> None:
    assert command.main(["dispatch", "--cases=reference", "--against=ragged_dot", "--repeats=3", f"--out={tmp_path}"]) == 0
    (outcome,) = json.loads((tmp_path / "dispatch.json").read_text())["cases"]
    assert "ragged_dot" in outcome["timings"][FORWARD]


@pytest.mark.usefixtures("tiny_shapes")
def test_memory_is_accounted_and_not_timed(tmp_path: Path) -> None:
    assert command.main(["memory", f"--out={tmp_path}"]) == 0
    accounts = {a["contestant"]: a for a in json.loads((tmp_path / "memory.json").read_text())["accounts"]}
    weights = 2 * 4 * 8 * 16 * 4
    assert accounts["grouped"]["results"] >= weights
    assert accounts["grouped"]["temporary"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dispach"], "unknown name 'dispach' in bench; did you mean 'dispatch'?"),
        (["dispatch", "--cases=refrence"], "did you mean 'reference'?"),
        (["dispatch", "--against=ragged"], "did you mean 'ragged_dot'?"),
        (["router", "--against=ragged_dot"], "unknown name 'ragged_dot' in --against"),
        (["dispatch", "--repeats=1"], "take at least 3"),
    ],
)
def test_wrong_names_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_bars_and_winners_follow_the_medians() -> None:
    times = {"dense": 1.0, "a": 1.2, "b": 1.1}
    timings = {FORWARD: {name: Timing(t, t, t, 0.0, 0) for name, t in times.items()}}
    outcome = Outcome("x", "", "dense", timings, "a", ("a", "b"), (Bar(FORWARD, "a", 1.1), Bar(FORWARD, "b", 1.15)))
    assert outcome.winner() == "b"
    assert [met for _, _, met in outcome.judged()] == [False, True]


@pytest.mark.parametrize("bench", ["dispatch", "decode"])
def test_auto_takes_what_won_the_recorded_bench(bench: str) -> None:
    """For every shape with a choice: the winner, or one within a tenth of it."""
    cases = {c["name"]: c for c in json.loads((RESULTS / f"{bench}.json").read_text())["cases"]}
    shapes = dispatch.shapes(bench)
    assert set(cases) == set(shapes)
    compared = 0
    for name, shape in shapes.items():
        if choices := cases[name]["choices"]:
            total = {c: sum(rows[c]["median"] for rows in cases[name]["timings"].values()) for c in choices}
            assert total[dispatch.chosen(shape)] <= 1.1 * min(total.values()), (name, total)
            compared += 1
    assert compared >= 2
