"""What makes two trainings the same one, and how the cache, the canary and the ledger use it."""

import json
import math

import jax
import numpy as np
import pytest
from toy_studies import FakeFit, final_bits, make_study

from configs import base_lm
from experiments import cache, canary, claims, matching, plots, record
from experiments.cache import Cache, key
from experiments.execute import execute, execute_config, finish
from experiments.study import Arm
from experiments.terminal import make_console
from moejax.core.errors import ConfigError


def test_a_second_execution_trains_nothing(tmp_path):
    fit = FakeFit()
    first = execute(make_study(), "cpu", runs=tmp_path, fit=fit)
    assert len(fit.calls) == 12
    second = execute(make_study(), "cpu", runs=tmp_path, fit=fit)
    assert len(fit.calls) == 12
    assert not first.runs["switch"][0].cached
    assert second.runs["switch"][0].cached
    assert second.runs["switch"][3].metrics == first.runs["switch"][3].metrics


def test_another_study_with_the_same_arm_uses_its_run(tmp_path):
    fit = FakeFit()
    execute(make_study(), "cpu", runs=tmp_path, arms=["switch"], fit=fit)
    other = execute(make_study("other"), "cpu", runs=tmp_path, fit=fit)
    assert [call for call in fit.calls if call[0].startswith("switch")] == [(f"switch seed {s}", s) for s in range(4)]
    assert other.runs["switch"][1].cached


def test_a_further_seed_trains_only_that_seed_and_fresh_trains_all(tmp_path):
    fit = FakeFit()
    execute(make_study(), "cpu", runs=tmp_path, arms=["dense"], seeds=2, fit=fit)
    execute(make_study(), "cpu", runs=tmp_path, arms=["dense"], seeds=3, fit=fit)
    assert [seed for _, seed in fit.calls] == [0, 1, 2]
    outcome = execute(make_study(), "cpu", runs=tmp_path, arms=["dense"], seeds=3, fresh=True, fit=fit)
    assert [seed for _, seed in fit.calls] == [0, 1, 2, 0, 1, 2]
    assert not outcome.runs["dense"][0].cached


@pytest.mark.parametrize(
    ("where", "value", "same"),
    [
        ("optimizer.learning_rate", 1e-2, False),
        ("model.blocks.moe.ffn.select.k", 2, False),
        ("eval.batches", 3, False),
        ("train.log_every", 7, True),
        ("checkpoint.every", 7, True),
        ("checkpoint.keep", 9, True),
        ("model.remat", "full", True),
        ("data.prefetch", 9, True),
        ("train.accumulation", 2, False),
    ],
)
def test_the_key_follows_what_changes_numbers_and_nothing_else(where, value, same):
    changed = base_lm.get_config()
    changed.update_from_flattened_dict({where: value})
    assert (key(changed, 0) == key(base_lm.get_config(), 0)) == same


def test_the_key_follows_seed_and_numerics_version_but_not_the_order_of_keys(monkeypatch):
    config = base_lm.get_config()
    assert key(config, 0) != key(config, 1)
    before = key(config, 0)
    shuffled = type(config)({name: config[name] for name in reversed(list(config))})
    assert key(shuffled, 0) == before
    monkeypatch.setattr(cache, "NUMERICS_VERSION", cache.NUMERICS_VERSION + 1)
    assert key(config, 0) != before


def test_a_block_that_the_model_does_not_use_does_not_count():
    plain, other = base_lm.get_config(), base_lm.get_config()
    for config in (plain, other):
        config.model.pattern = ("dense",)
    other.model.blocks.moe.ffn.num_experts = 64
    assert key(plain, 0) == key(other, 0)
    # Named by another block, it may be used.
    for config in (plain, other):
        with config.unlocked():
            config.model.blocks.dense.before = "moe"
    assert key(plain, 0) != key(other, 0)


def test_an_interrupted_training_is_not_taken_for_a_finished_one(tmp_path):
    class Killed(FakeFit):
        def __call__(self, *args, **kwargs):
            super().__call__(*args, **kwargs)
            raise SystemExit(143)

    with pytest.raises(SystemExit):
        execute(make_study(), "cpu", runs=tmp_path, arms=["dense"], fit=Killed())
    fit = FakeFit()
    execute(make_study(), "cpu", runs=tmp_path, arms=["dense"], fit=fit)
    assert [seed for _, seed in fit.calls] == [0, 1, 2, 3]


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    config = base_lm.get_config()
    with claims.claimed(Cache(tmp_path).path(config, 0).with_suffix(".claim"), "held"):
        with pytest.raises(ConfigError, match="another process is training"):
            Cache(tmp_path).train(config, 0, "x", FakeFit(), print)
        with pytest.raises(ConfigError, match="another process is training"):
            Cache(tmp_path).forget(config, 0)
    Cache(tmp_path).train(config, 0, "x", FakeFit(), lambda report: None)


def test_a_diverged_arm_is_a_result_and_the_others_go_on(tmp_path):
    from moejax.train import NonFiniteLoss

    class Diverges(FakeFit):
        def __call__(self, config, **kwargs):
            result = super().__call__(config, **kwargs)
            if "dense" in kwargs["label"]:
                raise NonFiniteLoss(7, [1, 2], None)
            return result

    outcome = execute(make_study(), "cpu", runs=tmp_path, fit=Diverges())
    assert "step 7" in outcome.runs["dense"][0].diverged
    assert outcome.runs["switch"][0].diverged == ""
    assert outcome.verdicts[0].word == "inconclusive"
    assert outcome.verdicts[0].reason == "'dense' diverged with seed 0"


def test_a_run_keeps_metrics_history_sizes_speed_and_origin(tmp_path):
    run = execute(make_study(), "cpu", runs=tmp_path, seeds=1, fit=FakeFit()).runs["switch"][0]
    assert run.value("params") == 1_234_567
    assert run.value("tokens_per_second") == 10_000
    assert run.value("stats/drop_rate") == 0.02
    assert run.value("eval/bits_per_byte") == pytest.approx(1.9 + 0.005 * math.sin(1))
    assert run.curve("train/loss")[0] == list(range(4, 101, 4))
    assert set(run.meta) == {"commit", "jax", "python", "device", "date"}


LEDGER_CASES = {
    "smoke": {"preset": "smoke"},
    "one arm left out": {"arms": ["dense", "switch"]},
    "fewer seeds": {"seeds": 2},
    "as many seeds, but fixed": {"seeds": 4},
    "an override": {"overrides": {"train.steps": 50}},
}


@pytest.mark.parametrize("case", LEDGER_CASES.values(), ids=LEDGER_CASES)
def test_what_is_not_complete_gets_no_ledger_entry(tmp_path, case):
    case = {"preset": "cpu", **case}
    outcome = execute(make_study(), case.pop("preset"), runs=tmp_path, fit=FakeFit(), **case)
    assert outcome.missing
    with pytest.raises(ValueError, match="no ledger entry for toy"):
        record.write_entry(outcome, tmp_path / "ledger")
    assert not (tmp_path / "ledger").exists()


def test_a_complete_run_writes_a_small_entry_that_depends_on_the_runs_alone(tmp_path):
    outcome = execute(make_study(), "cpu", runs=tmp_path / "runs", fit=FakeFit())
    path = record.write_entry(outcome, tmp_path / "ledger")
    text = path.read_text()
    assert path.name == "toy.json"
    assert len(text) < 10_000
    entry = json.loads(text)
    assert (entry["slug"], entry["preset"], entry["seeds"]) == ("toy", "cpu", 4)
    assert entry["steps"] == {"dense": 100, "switch": 100, "top2": 100}
    assert entry["skipped_arms"] == ["roomy"]
    assert {"commit", "device", "jax", "date"} <= set(entry)
    bits = entry["arms"]["dense"]["eval/bits_per_byte"]
    config = outcome.configs["dense"]
    assert bits["values"] == pytest.approx([final_bits(config, seed) for seed in range(4)])
    assert bits["mean"] == pytest.approx(sum(bits["values"]) / 4)
    assert [claim["verdict"] for claim in entry["claims"]] == ["reproduced", "not reproduced"]
    again = execute(make_study(), "cpu", runs=tmp_path / "runs", fit=FakeFit())
    assert record.write_entry(again, tmp_path / "ledger").read_text() == text


def test_ablations_and_the_papers_scale_have_entries_of_their_own(tmp_path):
    ablation = execute(make_study(), "cpu", runs=tmp_path / "runs", ablation="capacity", fit=FakeFit())
    assert record.write_entry(ablation, tmp_path).name == "toy.capacity.json"
    assert len(ablation.verdicts) == 3
    paper = execute(make_study(), "paper", runs=tmp_path / "runs", fit=FakeFit())
    assert record.write_entry(paper, tmp_path).name == "toy.paper.json"
    assert [entry["preset"] for entry in record.entries(tmp_path)] == ["cpu", "paper"]


def test_the_ranking_of_many_arms_stands_beside_their_entry(tmp_path):
    many = tuple(Arm(f"k{k}", {"model.blocks.moe.ffn.select.k": k}) for k in range(1, 6))
    study = make_study(arms=(*make_study().arms, *many))
    for ablation in ("", "capacity"):
        outcome = execute(study, "cpu", runs=tmp_path / "runs", ablation=ablation, fit=FakeFit())
        finish(outcome, tmp_path / "runs", tmp_path / "ledger", make_console(quiet=True))
    written = sorted(path.name for path in (tmp_path / "ledger").iterdir())
    assert written == ["toy.capacity.json", "toy.json", "toy.png", "verdicts.md"]


def test_a_ranking_shows_distances_within_a_seed(tmp_path, monkeypatch):
    """Losses are made up: an arm's own part, and one of the seed that is ten times as large and must cancel."""
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append(figure))
    many = tuple(Arm(f"k{k}", {"model.blocks.moe.ffn.select.k": k}) for k in range(2, 8))
    fit = FakeFit(lambda config, seed: 2 + 0.1 * config.model.blocks.moe.ffn.select.k + seed)
    outcome = execute(make_study(arms=(*make_study().arms, *many)), "cpu", runs=tmp_path / "runs", fit=fit)
    plots.ranking(outcome, tmp_path / "ranking.png")
    left, right = ([line.get_xdata() for line in axes.lines[::2]] for axes in drawn[0].axes)
    assert [len(dots) for dots in left] == [4] * len(outcome.runs)
    assert all(np.ptp(dots) > 1.9 for dots in left)
    assert all(np.ptp(dots) < 1e-9 for dots in right)
    np.testing.assert_allclose(np.diff([dots[0] for dots in right]), np.diff([dots[0] for dots in left]), atol=1e-9)


class TestCanary:
    """The trainer is made up; its losses are what the test says."""

    def check(self, folder, end=2.0, **options):
        fit = FakeFit(lambda config, seed: end)
        canary.check(folder, folder / "ledger" / "canary.json", fit, say=lambda text: None, **options)
        return len(fit.calls)

    def sources_changed(self, monkeypatch, name):
        monkeypatch.setattr(canary, "sources_hash", lambda: name)

    def test_an_unknown_platform_is_recorded_and_unchanged_sources_are_not_run_again(self, tmp_path):
        assert self.check(tmp_path) == 1
        recorded = json.loads((tmp_path / "ledger" / "canary.json").read_text())
        assert list(recorded) == [canary.platform_key()]
        assert len(recorded[canary.platform_key()]["losses"]) == canary.STEPS
        assert self.check(tmp_path) == 0

    def test_changed_sources_with_equal_numbers_pass(self, tmp_path, monkeypatch):
        self.check(tmp_path)
        self.sources_changed(monkeypatch, "new")
        assert self.check(tmp_path, end=2.0 * (1 + 1e-7)) == 1

    def test_numbers_that_came_with_the_repository_count_until_there_are_own_ones(self, tmp_path):
        shipped = tmp_path / "shipped.json"
        self.check(tmp_path / "a", end=2.0)
        shipped.write_text((tmp_path / "a" / "ledger" / "canary.json").read_text())
        with pytest.raises(ConfigError, match="numbers changed"):
            self.check(tmp_path / "b", end=2.1, shipped=shipped)
        assert not (tmp_path / "b" / "ledger").exists()
        self.check(tmp_path / "b", end=2.1, shipped=shipped, accept=True)
        self.check(tmp_path / "b", end=2.1, shipped=shipped)
        assert json.loads(shipped.read_text()) == json.loads((tmp_path / "a" / "ledger" / "canary.json").read_text())

    def test_changed_numbers_stop_until_the_version_is_bumped(self, tmp_path, monkeypatch):
        self.check(tmp_path)
        self.sources_changed(monkeypatch, "new")
        with pytest.raises(ConfigError, match=r"numbers changed: .*bump NUMERICS_VERSION=\d+ .*--accept_numerics"):
            self.check(tmp_path, end=2.001)
        monkeypatch.setattr(canary, "NUMERICS_VERSION", canary.NUMERICS_VERSION + 1)
        self.check(tmp_path, end=2.001)
        assert (
            json.loads((tmp_path / "ledger" / "canary.json").read_text())[canary.platform_key()]["numerics"]
            == canary.NUMERICS_VERSION
        )

    def test_accepted_numbers_are_recorded(self, tmp_path, monkeypatch):
        self.check(tmp_path)
        self.sources_changed(monkeypatch, "new")
        self.check(tmp_path, end=2.001, accept=True)
        self.check(tmp_path)

    def test_nan_is_a_change(self, tmp_path, monkeypatch):
        self.check(tmp_path)
        self.sources_changed(monkeypatch, "new")
        with pytest.raises(ConfigError, match="numbers changed"):
            self.check(tmp_path, end=math.nan)

    def test_the_hash_covers_the_library(self, monkeypatch, tmp_path):
        (tmp_path / "moejax").mkdir()
        (tmp_path / "moejax" / "a.py").write_text("x = 1")
        monkeypatch.setattr(canary.environment, "REPOSITORY", tmp_path)
        before = canary.sources_hash()
        (tmp_path / "moejax" / "a.py").write_text("x = 2")
        assert canary.sources_hash() != before


@pytest.mark.slow
def test_the_real_trainer_gives_what_cache_canary_and_plots_read(tmp_path, monkeypatch, request):
    monkeypatch.setattr(record, "LEDGER", tmp_path / "ledger")
    # The runner keeps compiled programs beside the runs; later tests should not.
    request.addfinalizer(lambda: jax.config.update("jax_compilation_cache_dir", None))
    config = canary.config()
    run = execute_config("tiny", config, runs=tmp_path)[0]
    assert not run.cached
    assert 0 < run.value("eval/bits_per_byte") < 9
    assert run.curve("train/loss")[0] == [1, 2, 3, 4, 5]
    assert all(run.matching(name) for name in (*cache.RESULT_FIELDS, "tokens_per_second", "stats/drop_rate"))
    measured, found = matching.of_config(config), matching.of_runs({"tiny": run})["tiny"]
    assert measured == found, "what a trace says before a run is what the run says"
    loads = plots.load_map([run])
    assert [load.shape for load in loads.values()] == [(4,)]
    assert all(load.mean() == pytest.approx(1) for load in loads.values())
    # The second time there is a cached run to stand beside, so the canary is asked; it trains the same config.
    assert execute_config("tiny", config, runs=tmp_path)[0].cached
    recorded = json.loads((tmp_path / "ledger" / "canary.json").read_text())
    assert recorded[canary.platform_key()]["losses"] == pytest.approx(run.curve("train/loss")[1], rel=1e-6)
