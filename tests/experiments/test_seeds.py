"""Seeds are added until every claim is decided: which runs are trained, in what order, and what a study's outcome depends on."""

import json
import math

import numpy as np
import pytest
from toy_studies import FakeFit, make_runs, make_study

from experiments import record, tables
from experiments.execute import execute, finished
from experiments.seeds import next_runs
from experiments.study import Arm, Preset, lower
from experiments.verdict import CONSTRUCTED, INCONCLUSIVE, NOT_MATCHED, REPRODUCED, judge

K = "model.blocks.moe.ffn.select.k"
ARMS = (Arm("dense", {"model.pattern": ("dense", "dense")}), *(Arm(f"k{k}", {K: k}) for k in (1, 2, 3)))


def study(**changes):
    """The headline is decided at once, 'k2 beats k1' never is, and no claim names k3."""
    claims = (
        lower("eval/bits_per_byte", "k1", "dense", headline=True, matched=()),
        lower("eval/bits_per_byte", "k2", "k1", text="never decided", matched=()),
    )
    return make_study(**{"arms": ARMS, "claims": claims, "ablations": {}, **changes})


def losses(config, seed):
    """k1 is better than dense; k2 is better than k1 with every other seed."""
    if "moe" not in config.model.pattern:
        return 2.0 + 0.01 * math.sin(seed)
    return 1.9 + (0.05 * (-1) ** seed if config.model.blocks.moe.ffn.select.k == 2 else 0.0)


def trained(fit):
    return [(label.split()[0], seed) for label, seed in fit.calls]


def test_only_arms_of_open_claims_get_more_seeds_and_seeds_come_one_by_one(tmp_path):
    fit = FakeFit(losses)
    outcome = execute(study(), "cpu", runs=tmp_path, fit=fit)
    first = [(arm, seed) for seed in range(4) for arm in ("dense", "k1", "k2", "k3")]
    assert trained(fit) == [*first, ("k1", 4), ("k2", 4), ("k1", 5), ("k2", 5)]
    decided, never = outcome.verdicts
    assert (decided.word, len(decided.seeds)) == (REPRODUCED, 4)
    assert (never.word, len(never.seeds), never.reason) == (INCONCLUSIVE, 6, "the interval contains 0")
    assert outcome.missing == ""
    rows = {row[0]: row[1] for row in tables.arms(outcome).rows}
    assert rows == {"dense": "4", "k1": "6", "k2": "6", "k3": "4"}


def test_a_headline_is_looked_at_up_to_13_seeds(tmp_path):
    fit = FakeFit(losses)
    claim = lower("eval/bits_per_byte", "k2", "k1", headline=True, matched=())
    outcome = execute(study(claims=(claim,)), "cpu", runs=tmp_path, fit=fit)
    assert {arm: len(seeds) for arm, seeds in outcome.runs.items()} == {"dense": 4, "k1": 13, "k2": 13, "k3": 4}
    assert record.entry(outcome)["claims"][0]["looks"] == [4, 6, 9, 13]


def test_the_outcome_depends_on_the_looks_and_not_on_what_else_is_in_the_cache(tmp_path):
    outcome = execute(study(), "cpu", runs=tmp_path, fit=FakeFit(losses))
    text = record.write_entry(outcome, tmp_path / "ledger").read_text()
    execute(study(), "cpu", runs=tmp_path, fit=FakeFit(losses), seeds=9)
    fit = FakeFit(losses)
    again = execute(study(), "cpu", runs=tmp_path, fit=fit)
    assert fit.calls == []
    assert record.write_entry(again, tmp_path / "ledger").read_text() == text
    found = finished(study(), "cpu", "", tmp_path)
    assert {arm: sorted(seeds) for arm, seeds in found.runs.items()} == {
        arm: sorted(seeds) for arm, seeds in again.runs.items()
    }


def test_an_interrupted_study_is_reported_and_goes_on_where_it_was(tmp_path):
    class Stops(FakeFit):
        def __call__(self, *args, **kwargs):
            if len(self.calls) == 17:
                raise SystemExit(143)
            return super().__call__(*args, **kwargs)

    with pytest.raises(SystemExit):
        execute(study(), "cpu", runs=tmp_path, fit=Stops(losses))
    partly = finished(study(), "cpu", "", tmp_path)
    assert partly.missing == "3 runs are still to come"
    assert [v.reason for v in partly.verdicts] == ["", "4 of 6 seeds for the next look"]
    fit = FakeFit(losses)
    execute(study(), "cpu", runs=tmp_path, fit=fit)
    assert trained(fit) == [("k2", 4), ("k1", 5), ("k2", 5)]


def test_seeds_on_the_command_line_are_one_look_without_a_ledger_entry(tmp_path):
    outcome = execute(study(), "cpu", runs=tmp_path, fit=FakeFit(losses), seeds=5)
    assert {len(seeds) for seeds in outcome.runs.values()} == {5}
    assert [verdict.needs for verdict in outcome.verdicts] == [0, 0]
    assert outcome.missing.startswith("--seeds=5 is a look of its own")
    low, high = outcome.verdicts[0].interval
    values = np.array(outcome.verdicts[0].values)
    # 2.132 is the one-sided 95 % quantile of Student's t with 4 degrees of freedom.
    assert (high - low) / 2 == pytest.approx(2.132 * values.std(ddof=1) / math.sqrt(5), rel=1e-3)


def test_what_can_never_be_decided_gets_no_more_seeds():
    made = study(presets={"smoke": Preset(looks=(1,), headline_looks=(1,)), "cpu": Preset()})
    runs = {arm: dict(make_runs(**{arm: [1.0] * 4})[arm]) for arm in ("dense", "k1", "k2", "k3")}
    assert next_runs(made, "cpu", list(runs), {}) == [(arm, seed) for seed in range(4) for arm in runs]
    # Nothing was measured: both claims are closed without a verdict.
    assert next_runs(made, "cpu", list(runs), runs) == []
    assert next_runs(made, "smoke", list(runs), {}) == [(arm, 0) for arm in runs]


def test_arms_that_are_not_matched_are_not_judged_and_say_what_to_change():
    runs = make_runs(a=[1.0, 2.0, 3.0, 4.0], b=[0.8, 1.79, 2.78, 3.81])
    sizes = {
        "a": {"flops_per_step": 2e6, "tokens_per_step": 10, "params": 1000},
        "b": {"flops_per_step": 5e6, "tokens_per_step": 20, "params": 1029},
    }
    for arm, seeds in runs.items():
        for run in seeds.values():
            run.metrics.update(sizes[arm])
    looks = (4,)
    assert judge(lower("m", "b", "a", matched=("params",)), runs, "cpu", looks).word == REPRODUCED
    verdict = judge(lower("m", "b", "a", matched=("params", "flops")), runs, "cpu", looks)
    assert verdict.word == NOT_MATCHED
    assert "250,000 in 'b', 200,000 in 'a'; 'a' needs 1.25 times as many: change the width (hidden)" in verdict.reason
    assert judge(lower("m", "b", "a", matched=("memory",)), runs, "cpu", looks).reason.startswith(
        "'b' did not measure its bytes"
    )
    assert tables.count_verdicts([{"claims": [{"verdict": verdict.word}]}]) == "1 not matched"


def test_a_claim_that_gives_the_same_number_with_all_seeds_is_no_claim():
    runs = make_runs(a=[1.0, 2.0, 3.0, 4.0], b=[1.0, 2.0, 3.0, 4.0])
    verdict = judge(lower("m", "b", "a"), runs, "cpu", (4, 6))
    assert (verdict.word, verdict.needs) == (CONSTRUCTED, 0)
    assert verdict.reason == "all 4 seeds gave exactly 0; that is a test, not a claim"


def test_the_entry_says_what_was_matched_looked_at_and_used(tmp_path):
    outcome = execute(make_study(), "cpu", runs=tmp_path, fit=FakeFit())
    claim = json.loads(record.write_entry(outcome, tmp_path / "ledger").read_text())["claims"][0]
    assert (claim["matched"], claim["looks"], len(claim["values"])) == (["flops"], [4, 6, 9, 13], 4)
    assert claim["evaluation_error"] is None
