"""An arm that diverged: its study is reported, and so is every other study after it."""

import json
import math

import pytest
from toy_studies import FakeFit, make_study

from experiments import docs, record, report, tables
from experiments.execute import execute, execute_config, finish
from experiments.terminal import make_console
from moejax.core.errors import ConfigError
from moejax.train import NonFiniteLoss


class Diverges(FakeFit):
    """The dense arm diverges after its history was written; `metric` there is what an overflow leaves."""

    def __call__(self, config, **kwargs):
        result = super().__call__(config, **kwargs)
        if kwargs["label"].startswith("dense"):
            path = kwargs["workdir"] + "/metrics.jsonl"
            with open(path) as file:
                kept = [json.loads(line) for line in file][:6]
            kept[-1] |= {"train/loss": math.nan, "eval/bits_per_byte": math.inf}
            with open(path, "w") as file:
                file.writelines(json.dumps(line) + "\n" for line in kept)
            raise NonFiniteLoss(7, [1, 2], None)
        return result


@pytest.fixture
def diverged(tmp_path):
    """The ledger after a study one of whose arms diverged with every seed."""
    outcome = execute(make_study(docs.DEMO), "cpu", runs=tmp_path / "runs", fit=Diverges())
    finish(outcome, tmp_path / "runs", tmp_path / "ledger", make_console(quiet=True))
    return tmp_path


def test_its_ledger_entry_is_strict_json_and_reads_back_as_nan(diverged):
    text = (diverged / "ledger" / f"{docs.DEMO}.json").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name))["claims"][0]["interval"] == [None, None]
    (entry,) = record.entries(diverged / "ledger")
    claim = entry["claims"][0]
    assert all(map(math.isnan, (*claim["interval"], claim["mean"], claim["std"], *claim["values"])))
    assert claim["reason"] == "'dense' diverged with seed 0"


def test_every_table_and_the_index_are_made_with_it(diverged, monkeypatch):
    ledger = diverged / "ledger"
    notes = make_study()
    monkeypatch.setattr(docs, "load", lambda slug: notes)
    rows = docs.demo_table(ledger).splitlines()
    assert "| dense | - | - | equal FLOPs per token |" in rows
    assert "| Switch beats dense at equal compute | - | - | inconclusive |" in rows
    monkeypatch.setattr(docs, "DEMO", "another study")
    assert "| Switch beats dense at equal compute | - | - | inconclusive |" in docs.verdict_table(ledger)
    assert "inconclusive" in report.write_index([ledger], diverged / "runs").read_text()


def test_a_diverged_config_has_a_summary(tmp_path):
    found = execute_config("dense", make_study().base, runs=tmp_path, fit=Diverges())
    rows = dict(tables.summary_of("dense", found).rows)
    assert (rows["time"], rows["params"], rows["eval/bits_per_byte"]) == ("-", "-", "inf")


def test_a_damaged_entry_is_named(diverged):
    (diverged / "ledger" / "a.json").write_text('{"slug": "a"')
    with pytest.raises(ConfigError, match=r"a\.json is no ledger entry"):
        record.entries(diverged / "ledger")
