"""Arms that start from arms: what is trained once, what a study may say, what the command line reaches, and what is shown."""

import re
import threading
import time

import pytest
from toy_studies import FakeFit, make_study

from configs import base_lm, small_lm
from experiments import claims, overrides, pods, progress, report, tables
from experiments.cache import Cache, key
from experiments.execute import execute, execute_config
from experiments.run import main
from experiments.study import Arm, Preset, lower, resolve
from experiments.terminal import make_console
from moejax.aot import ahead
from moejax.aot.report import held_bytes
from moejax.core.errors import ConfigError
from moejax.train import StartDiverged
from moejax.train.checks import check_config

SHORT = {"train.steps": 50}
START = Arm("pretrained", {"model.pattern": ("dense", "dense"), "train.steps": 70})


def source(arm="pretrained", **fields):
    return {"kind": "run", "arm": arm, **fields}


def make(slug="toy", **changes):
    """Two arms that start from a start, one from an arm, one from nothing."""
    arms = (
        Arm("switch", SHORT),
        Arm("tuned", {**SHORT, "init.source": source(), "trainable": {"norms": {}, "head": {"rate": 0.1, "since": 0.5}}}),
        Arm("moved", {**SHORT, "init.source": source(), "init.surgeries": {"keep": {"without": ("head",)}}}),
        Arm("longer", {"init.source": source("switch", seed=0)}),
    )
    claims = (lower("eval/bits_per_byte", "tuned", "switch", headline=True, matched=()),)
    fields = {"arms": arms, "starts": (START,), "claims": claims, "ablations": {}}
    return make_study(slug, **{**fields, **changes})


def test_a_start_is_trained_once_for_all_arms_seeds_and_studies(tmp_path):
    fit = FakeFit()
    execute(make(), "cpu", runs=tmp_path, seeds=2, fit=fit)
    assert fit.calls == [
        ("switch seed 0", 0),
        ("init.source of tuned seed 0", 0),
        ("tuned seed 0", 0),
        ("moved seed 0", 0),
        ("longer seed 0", 0),  # from the arm switch, which is there
        ("switch seed 1", 1),
        ("init.source of tuned seed 1", 1),
        ("tuned seed 1", 1),
        ("moved seed 1", 1),
        ("longer seed 1", 1),  # from the fixed seed 0
    ]
    fit.calls.clear()
    other = make("other", arms=(Arm("tuned", {"init.source": source(), "train.steps": 9}), *make().arms[:1]))
    execute(other, "cpu", runs=tmp_path, seeds=2, fit=fit)
    assert fit.calls == [("tuned seed 0", 0), ("tuned seed 1", 1)]


def test_a_start_that_is_named_first_is_the_run_of_the_arm_itself(tmp_path):
    fit = FakeFit()
    execute(make(), "cpu", runs=tmp_path, arms=["longer"], seeds=1, fit=fit)
    outcome = execute(make(), "cpu", runs=tmp_path, arms=["switch"], seeds=1, fit=fit)
    assert [label for label, _ in fit.calls] == ["init.source of longer seed 0", "longer seed 0"]
    assert outcome.runs["switch"][0].cached


def test_a_start_has_the_scale_of_the_preset_and_the_overrides_of_the_command_line():
    study = make(
        presets={
            "smoke": Preset({"train.steps": 4, "data.batch_size": 2}, arms={"pretrained": {"train.steps": 6}}),
            "cpu": Preset({"train.steps": 100}),
        }
    )
    smoke = resolve(study, "smoke", "tuned", {"optimizer.learning_rate": 0.5, "init.source.seed": 2}).init.source
    assert (smoke.config.train.steps, smoke.config.data.batch_size, smoke.config.optimizer.learning_rate) == (6, 2, 0.5)
    assert smoke.config.model.pattern == ("dense", "dense")
    assert smoke.seed == 2
    assert "source" in smoke.config.init
    assert resolve(study, "cpu", "tuned").init.source.config.train.steps == 70
    # A key of the start alone.
    longer = resolve(study, "smoke", "tuned", {"init.source.config.train.steps": 11})
    assert (longer.train.steps, longer.init.source.config.train.steps) == (50, 11)


def test_a_start_of_another_study_is_found_by_its_name():
    study = make(arms=(Arm("switch"), Arm("tuned", {"init.source": source("dense", study="first_mixture")})))
    config = resolve(study, "smoke", "tuned").init.source.config
    assert config.model.num_layers == 2
    assert config.train.steps == 4


def test_a_teacher_is_a_start_too(tmp_path):
    study = make(arms=(Arm("switch"), Arm("tuned", {"task": {"kind": "next_token", "teacher": source("switch")}})))
    assert resolve(study, "cpu", "tuned").task.teacher.config.train.steps == 100
    assert key(resolve(study, "cpu", "tuned"), 0) != key(resolve(study, "cpu", "switch"), 0)


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ({"init.source": source("pretraned")}, r"unknown arm 'pretraned' of study 'toy'; did you mean 'pretrained'\? \(init.source in arm 'tuned'"),
        ({"init.source": source("tuned")}, r"arm 'tuned' of study 'toy' starts from itself: arm 'tuned' of study 'toy' from arm 'tuned'"),
        ({"init.source": source(config={})}, r"init.source in arm 'tuned' of study 'toy' has an arm and a config; give one of them"),
        ({"init.source": source(study="swich")}, r"unknown study 'swich' in experiments/"),
        ({"init": 3}, r"init=3 in arm 'tuned' of study 'toy' is an int, but the config holds a mapping"),
    ],
)  # fmt: skip
def test_starts_that_cannot_be_are_named_when_the_study_is_read(arms, message):
    with pytest.raises(ConfigError, match=message):
        make(arms=(Arm("switch"), Arm("tuned", arms)))


class TestKey:
    def config(self, **dotted):
        config = overrides.copy(base_lm.get_config())
        overrides.apply(config, {name.replace("__", "."): value for name, value in dotted.items()}, "test")
        return config

    def test_no_start_and_no_rule_leave_keys_as_they_were(self):
        assert key(base_lm.get_config(), 0) == key(self.config(), 0) == key(self.config(trainable={"norms": None}), 0)

    def test_starts_and_rules_are_part_of_the_key(self):
        start = {"kind": "run", "config": small_lm.get_config().to_dict()}
        other = small_lm.get_config()
        other.train.steps = 7
        configs = [
            self.config(),
            self.config(trainable={"norms": {}}),
            self.config(trainable={"biases": {}}),
            self.config(init__source=start),
            self.config(init__source={**start, "seed": 0}),
            self.config(init__source={**start, "config": other.to_dict()}),
            self.config(init__source=start, init__surgeries={"keep": {}}),
            self.config(init__source=start, init__others={"b": start}),
        ]
        assert len({key(config, 0) for config in configs}) == len(configs)

    def test_what_is_cosmetic_in_a_start_is_cosmetic(self):
        plain, moved = small_lm.get_config(), overrides.copy(small_lm.get_config())
        moved.mesh, moved.train.log_every = "dp", 3
        starts = [{"kind": "run", "config": config.to_dict()} for config in (plain, moved)]
        assert len({key(self.config(init__source=start), 0) for start in starts}) == 1

    def test_a_checkpoint_counts_by_what_is_in_it(self, tmp_path):
        folder = tmp_path / "checkpoints" / "3"
        folder.mkdir(parents=True)
        config, keys = self.config(init__source={"kind": "checkpoint", "path": str(tmp_path)}), []
        for text in ("{}", '{"a": 1}', "{}"):
            (folder / "checksums.json").write_text(text)
            keys.append(key(config, 0))
        assert keys[0] == keys[2] != keys[1]


def test_a_command_waits_for_another_one_that_trains_its_start(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "POLL", 0.02)
    start = resolve(make(), "cpu", "pretrained")
    held = Cache(tmp_path).path(start, 0)
    reports, fit, taken = [], FakeFit(), threading.Event()

    def other():
        with claims.claimed(held.with_suffix(".claim"), "held"):
            taken.set()
            while not reports:
                time.sleep(0.01)
            assert fit.calls == [], "nobody trains what is being trained"
            # The other one has finished it.
            Cache(tmp_path / "other").train(start, 0, "x", FakeFit(), lambda report: None)
            (tmp_path / "other" / "trained" / held.name).rename(held)

    thread = threading.Thread(target=other)
    thread.start()
    taken.wait()
    with pytest.raises(claims.Busy):
        Cache(tmp_path).starts(fit)(start.to_dict(), 0, reports.append, "init.source of x")
    folder = Cache(tmp_path).starts(fit, wait=True)(start.to_dict(), 0, reports.append, "init.source of x")
    thread.join()
    assert folder == held
    assert fit.calls == []
    assert {(r.label, r.phase, r.steps) for r in reports} == {("init.source of x", "waiting", 70)}


def test_a_start_that_diverged_makes_its_arms_diverge(tmp_path):
    from moejax.train import NonFiniteLoss

    class Diverges(FakeFit):
        def __call__(self, config, **kwargs):
            result = super().__call__(config, **kwargs)
            if kwargs["label"].startswith("init.source"):
                raise NonFiniteLoss(7, [1, 2], None)
            return result

    fit = Diverges()
    outcome = execute(make(), "cpu", runs=tmp_path, arms=["tuned", "moved"], seeds=1, fit=fit)
    assert [label for label, _ in fit.calls] == ["init.source of tuned seed 0"]
    for arm in ("tuned", "moved"):
        assert f"init.source of {arm} seed 0 diverged: loss, gradient" in outcome.runs[arm][0].diverged
    assert issubclass(StartDiverged, NonFiniteLoss)


def test_a_config_in_a_folder_of_its_own_still_shares_its_start(tmp_path):
    config, fit = resolve(make(), "cpu", "tuned"), FakeFit()
    execute_config("a", config, runs=tmp_path / "runs", workdir=tmp_path / "here", fit=fit)
    execute_config("b", config, runs=tmp_path / "runs", workdir=tmp_path / "there", fit=fit)
    assert [label for label, _ in fit.calls] == ["init.source of a seed 0", "a seed 0", "b seed 0"]


class TestCommandLine:
    def parsed(self, **texts):
        config = overrides.copy(base_lm.get_config())
        named = {name.replace("__", "."): text for name, text in texts.items()}
        values = {name: overrides.parse(config, name, text, "the command line") for name, text in named.items()}
        overrides.apply(config, values, "the command line")
        return config

    def test_starts_and_rules_are_reached_whatever_is_there(self):
        config = self.parsed(
            init__source__kind="checkpoint",
            init__source__path="runs/x",
            init__source__step="30",
            init__surgeries__extend__paths="('head',)",
            trainable__norms__rate="0.1",
            trainable__late__what="('stack',)",
            trainable__late__since="0.5",
        )
        assert config.init.source.to_dict() == {"kind": "checkpoint", "path": "runs/x", "step": 30}
        assert config.init.surgeries.to_dict() == {"extend": {"paths": ("head",)}}
        assert config.trainable.to_dict() == {"norms": {"rate": 0.1}, "late": {"what": ("stack",), "since": 0.5}}

    def test_reading_a_value_changes_nothing(self):
        config = overrides.copy(base_lm.get_config())
        overrides.parse(config, "trainable.norms.rate", "0.1", "x")
        assert config.trainable.to_dict() == {}

    def test_a_whole_section_and_a_rule_that_is_left_out(self):
        assert self.parsed(trainable="{'norms': {}}").trainable.to_dict() == {"norms": {}}
        config = overrides.copy(base_lm.get_config())
        overrides.apply(config, {"trainable": {"norms": {}}}, "x")
        overrides.apply(config, {"trainable.norms": None, "init.order": ("a",), "init.source.seed": "own"}, "x")
        overrides.apply(config, {"init.source.seed": 3}, "x")
        assert (config.trainable.norms, config.init.order, config.init.source.seed) == (None, ("a",), 3)

    @pytest.mark.parametrize(
        ("argument", "message"),
        [
            ("--config.init.source.kind=chekpoint", r"unknown source kind 'chekpoint' in init\.source\.kind; did you mean 'checkpoint'"),
            ("--config.init.sorce.kind=run", r"unknown key 'sorce' in init; did you mean 'source'"),
            ("--config.init.source.kind.x=run", r"'init\.source\.kind\.x' in the command line goes below 'init\.source\.kind'"),
            ("--config.init.surgeries.kep.paths=x", r"unknown surgery kind 'kep' in init\.surgeries\.kep\.kind; did you mean 'keep'"),
            ("--config.trainable.norms.rates=0.1", r"unknown key 'rates' in trainable\.norms; did you mean 'rate'"),
            ("--config.trainabel.norms.rate=0.1", r"unknown key 'trainabel' in config .*did you mean 'trainable'"),
        ],
    )  # fmt: skip
    def test_a_mistake_is_one_line_that_names_the_place(self, tmp_path, capsys, argument, message):
        assert main(["--config=configs/base_lm.py", f"--runs={tmp_path}", argument]) == 2
        assert re.fullmatch(rf"error: .*{message}.*\n", capsys.readouterr().err)

    def test_what_a_start_gets_wrong_is_found_before_anything_is_trained(self):
        start = small_lm.get_config()
        start.model.blocks.moe.ffn.select = {"kind": "top_k", "kk": 2}
        config = overrides.copy(base_lm.get_config())
        overrides.apply(config, {"init.source": {"kind": "run", "config": start.to_dict()}}, "x")
        with pytest.raises(
            ConfigError, match=r"unknown key 'kk' in model.blocks.moe.ffn.select .*\(the config at init.source.config\)"
        ):
            check_config(config)


def test_the_list_says_what_arms_start_from_and_what_learns():
    study = make(
        arms=(
            *make().arms,
            Arm("whole", {"init": {"source": source()}}),
            Arm(
                "merged",
                {
                    "init.source": {"kind": "checkpoint", "path": "runs/x"},
                    "init.others": {"a": source("dense", study="first_mixture")},
                },
            ),
        )
    )
    (starts,) = [table for table in tables.describe(study) if table.title == "Starts"]
    assert starts.rows == (
        ("pretrained", "nothing", "-", "everything"),
        ("tuned", "arm pretrained (own seed)", "-", "head x 0.1 from 0.5; norms"),
        ("moved", "arm pretrained (own seed)", "keep", "everything"),
        ("longer", "arm switch (seed 0)", "-", "everything"),
        ("whole", "arm pretrained (own seed)", "-", "everything"),
        ("merged", "checkpoint runs/x; a: arm dense of first_mixture (own seed)", "-", "everything"),
    )
    assert "Starts" not in [table.title for table in tables.describe(make_study())]


def test_the_report_names_a_start_in_a_line_and_not_in_all_its_keys(tmp_path):
    outcome = execute(make(), "cpu", runs=tmp_path, arms=["switch", "tuned"], seeds=1, fit=FakeFit())
    rows = report.differences(outcome).rows
    assert ("tuned", "init.source.config", "-", "'a run of 70 steps'") in rows
    assert not [row for row in rows if row[1].startswith("init.source.config.")]
    assert ("tuned", "trainable.head.rate", "-", "0.1") in rows


def test_progress_says_which_run_is_trained(capsys):
    line = progress.Board(make_console(), 5).line("tuned", 0, 50)
    for label, step, steps in (("init.source of tuned seed 0", 3, 70), ("tuned seed 0", 1, 50)):
        line(_Report(label, step, steps))
    out = capsys.readouterr().out.splitlines()
    assert [" ".join(text.split()) for text in out] == [
        "tuned seed 0 first init.source: step 3/70 train",
        "tuned seed 0 step 1/50 train",
    ]


class _Report:
    tokens_per_second = loss = seconds_left = None
    phase = "train"

    def __init__(self, label, step, steps):
        self.label, self.step, self.steps = label, step, steps


def test_the_compile_report_tells_what_learns_from_what_is_frozen():
    config = overrides.copy(base_lm.get_config())
    changes = {"model.d_model": 32, "model.num_layers": 2, "data.seq_len": 16, "mesh": "fsdp"}
    overrides.apply(config, changes, "x")
    where = ahead.topology("cpu:8")
    whole = held_bytes(ahead.program_for(config, where))
    overrides.apply(config, {"trainable": {"norms": {}}}, "x")
    program = ahead.program_for(config, where)
    part = held_bytes(program)
    norms = 4 * 32 * (2 * 2 + 1)
    assert program.trainable_params == norms // 4
    # Norms are copied to every device, the rest is split.
    assert part["parameters"] == norms
    assert part["optimizer"] == pytest.approx(2 * norms, abs=16)
    assert whole["frozen"] == 0
    assert part["parameters"] + part["frozen"] == whole["parameters"]
    assert whole["optimizer"] == pytest.approx(2 * whole["parameters"], abs=16)
    assert pods.PARTS[:3] == ("parameters", "frozen", "optimizer")
