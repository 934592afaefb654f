"""What is damaged in the run cache is noticed, set aside, named, and made again."""

import json
import re

import pytest
from toy_studies import FakeFit, make_study

from experiments import canary
from experiments.cache import Cache
from experiments.execute import execute
from moejax.core.errors import ConfigError
from moejax.core.files import Damaged, read_lines, read_sealed, write_sealed


def digit_changed(file):
    """Another digit in the middle of a number, or of a checksum."""
    text = file.read_text()
    place = [match.start() for match in re.finditer(r"\d(?=\d)", text)][len(text) // 40]
    file.write_text(text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :])


DAMAGES = {
    "a digit": digit_changed,
    "cut": lambda file: file.write_text(file.read_text()[: file.stat().st_size // 2]),
    "emptied": lambda file: file.write_text(""),
    "no JSON": lambda file: file.write_bytes(b"\xff\x00[1"),
    "a list": lambda file: file.write_text("[1, 2]\n"),
}


@pytest.fixture
def runs(tmp_path):
    execute(make_study(), "cpu", runs=tmp_path, arms=["dense"], seeds=1, fit=FakeFit())
    return tmp_path


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "timings.jsonl"])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_run_is_set_aside_and_made_again(runs, name, damage):
    (file,) = runs.glob(f"trained/*/{name}")
    before = execute(make_study(), "cpu", runs=runs, arms=["dense"], seeds=1, fit=FakeFit()).runs["dense"][0]
    assert before.cached
    damage(file)
    fit = FakeFit()
    with pytest.warns(Damaged) as told:
        again = execute(make_study(), "cpu", runs=runs, arms=["dense"], seeds=1, fit=fit).runs["dense"][0]
    (line,) = [str(warning.message) for warning in told]
    assert re.fullmatch(rf"run \S+/run\.json is damaged \(({re.escape(name)}.*)\); moved to \S+/run\.json\.corrupt", line)
    assert len(fit.calls) == 1
    assert (again.metrics, again.history) == (before.metrics, before.history)
    assert execute(make_study(), "cpu", runs=runs, arms=["dense"], seeds=1, fit=fit).runs["dense"][0].cached
    assert len(fit.calls) == 1


def test_a_damaged_run_is_deleted_where_it_is_to_be_fresh(runs):
    (file,) = runs.glob("trained/*/run.json")
    file.write_text("{")
    fit = FakeFit()
    assert not execute(make_study(), "cpu", runs=runs, arms=["dense"], seeds=1, fresh=True, fit=fit).runs["dense"][0].cached
    assert not list(runs.glob("trained/*/*.corrupt"))


def test_a_cut_last_line_is_dropped_with_a_word(tmp_path):
    class Cut(FakeFit):
        def __call__(self, *args, **kwargs):
            result = super().__call__(*args, **kwargs)
            for name in ("timings.jsonl", "metrics.jsonl"):
                with open(f"{kwargs['workdir']}/{name}", "a") as file:
                    file.write('{"step": 101, "tokens_per_se')
            return result

    with pytest.warns(Damaged, match=r"1 line of \S+/timings\.jsonl cannot be read: left out"):
        outcome = execute(make_study(), "cpu", runs=tmp_path, arms=["dense"], seeds=1, fit=Cut())
    assert outcome.runs["dense"][0].value("tokens_per_second") == 10_000
    assert [row["step"] for row in outcome.runs["dense"][0].history] == list(range(4, 101, 4))


def test_a_sealed_file_reads_back_and_does_not_mind_spaces(tmp_path):
    data = {"b": [1, 2.5, None, float("inf")], "a": {"x": "ä", "1": True}}
    write_sealed(tmp_path / "x.json", data)
    assert read_sealed(tmp_path / "x.json") == data
    (tmp_path / "x.json").write_text(json.dumps(json.loads((tmp_path / "x.json").read_text()), indent=4, sort_keys=True))
    assert read_sealed(tmp_path / "x.json") == data
    (tmp_path / "x.json").write_text('{"b": 1}')
    with pytest.raises(ValueError, match="no checksum"):
        read_sealed(tmp_path / "x.json")


def test_lines_that_are_no_mappings_are_left_out(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"step": 1}\n\xff\n[2]\n\n{"step": 3}\n')
    with pytest.warns(Damaged, match="2 lines of"):
        assert read_lines(tmp_path / "x.jsonl") == [{"step": 1}, {"step": 3}]


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_canary_sings_again_and_a_damaged_record_is_refused(tmp_path, damage):
    record = tmp_path / "ledger" / "canary.json"

    def check(**options):
        fit = FakeFit(lambda config, seed: 2.0)
        canary.check(tmp_path, record, fit, say=lambda text: None, **options)
        return len(fit.calls)

    assert (check(), check()) == (1, 0)
    damage(tmp_path / "canary.json")
    with pytest.warns(Damaged, match=r"canary \S+/canary\.json is damaged"):
        assert check() == 1
    assert (tmp_path / "canary.json.corrupt").exists()
    # A digit of the losses; any other damage makes it no JSON, or no mapping.
    losses = json.loads(record.read_text())[canary.platform_key()]["losses"]
    changed = record.read_text().replace(repr(losses[0]), repr(losses[0] + 1e-4))
    record.write_text(changed) if damage is digit_changed else damage(record)
    with pytest.raises(ConfigError, match=r"canary\.json.* (is damaged|cannot be read).*take it from the repository"):
        check()


def test_reports_say_nothing_of_a_damaged_run_and_leave_it(runs):
    (file,) = runs.glob("trained/*/run.json")
    config = execute(make_study(), "cpu", runs=runs, arms=["dense"], seeds=1, fit=FakeFit()).configs["dense"]
    file.write_text("{")
    assert Cache(runs).load(config, 0, "dense") is None
    assert file.exists()
