"""Studies, arms, claims and overrides: what resolves to what, and what is refused with which words."""

import pytest
from ml_collections import ConfigDict
from toy_studies import SOURCE, make_study

from configs import base_lm, base_vit
from experiments import overrides, study
from experiments.departures import Departures, suspect_of
from experiments.quantities import Speedup, lowest, mean
from experiments.study import (
    Arm,
    Claim,
    Preset,
    above,
    below,
    changes_less,
    faster,
    gains,
    higher,
    lower,
    optimum,
    resolve,
    sooner,
    trend,
    within,
)
from moejax.core.errors import ConfigError

ARMS = (Arm("dense"), Arm("switch"))
SAID = dict.fromkeys(("scale", "method", "left_out", "capacity", "optimizer", "decay", "init"), "otherwise")
SELECT = "model.blocks.moe.ffn.select"
LATE = {"kind": "top_k", "k": 1, "capacity_factor": 1.0, "eval_capacity_factor": None}  # drops in training only
CHOICE = {"kind": "expert_choice", "capacity_factor": 1.0}
CLAIM = (lower("m", "switch", "dense", headline=True, matched=()),)


def test_an_arm_is_base_then_preset_then_arm_then_preset_for_the_arm_then_command_line():
    base = ConfigDict({"train": {"steps": 1, "a": 0, "b": 0, "c": 0, "d": 0}})
    everything = {f"train.{k}": v for k, v in {"a": "preset", "b": "preset", "c": "preset", "d": "preset"}.items()}
    arm = Arm("x", {"train.b": 2, "train.c": 2, "train.d": 2})
    preset = Preset(dict.fromkeys(everything, 1), arms={"x": {"train.c": 3, "train.d": 3}})
    made = make_study(
        base=base, arms=(arm,), ablations={}, presets={"smoke": preset}, claims=(above("m", "x", 0, headline=True),)
    )
    config = resolve(made, "smoke", "x", {"train.d": 4})
    assert [config.train[k] for k in "abcd"] == [1, 2, 3, 4]
    assert base.train.a == 0


def test_a_mapping_replaces_a_whole_sub_dict():
    made = make_study(arms=(Arm("dense"), Arm("switch", {"model.blocks.moe.ffn": {"kind": "glu", "hidden": 7}})), claims=CLAIM)
    assert resolve(made, "smoke", "switch").model.blocks.moe.ffn.to_dict() == {"kind": "glu", "hidden": 7}


def test_an_override_changes_one_place_even_if_the_base_used_one_dict_twice():
    shared = {"num_heads": 4}
    base = ConfigDict({"model": {"blocks": {"a": {"mixer": shared}, "b": {"mixer": shared}}}, "train": {"steps": 1}})
    assert base.model.blocks.a.mixer is base.model.blocks.b.mixer
    arms = (Arm("x", {"model.blocks.a.mixer.num_heads": 8}),)
    presets, claims = {"smoke": Preset()}, (above("m", "x", 0, headline=True),)
    blocks = resolve(make_study(base=base, arms=arms, ablations={}, presets=presets, claims=claims), "smoke", "x").model.blocks
    assert (blocks.a.mixer.num_heads, blocks.b.mixer.num_heads) == (8, 4)


def test_blocks_may_gain_keys_and_other_sections_may_not():
    config = base_lm.get_config()
    overrides.apply(config, {"model.blocks.moe.ffn.router.jitter": 0.1, "model.blocks.more": {"kind": "transformer"}}, "test")
    assert config.model.blocks.moe.ffn.router.jitter == 0.1
    assert config.model.blocks.more.kind == "transformer"
    with pytest.raises(ConfigError, match=r"unknown key 'slect' in config\.model\.blocks\.moe\.ffn .*did you mean 'select'"):
        overrides.apply(config, {"model.blocks.moe.ffn.slect.k": 2}, "test")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train.stepz": 3}, r"unknown key 'stepz' in config\.train .*did you mean 'steps'"),
        ({"trian.steps": 3}, r"unknown key 'trian' in config .*did you mean 'train'"),
        ({"train.steps": "many"}, r"train\.steps='many' in test is a str, but the config holds an int: 300"),
        ({"train.steps.x": 3}, r"goes below 'train\.steps', which is 300"),
        ({"optimizer": 3}, r"optimizer=3 in test is an int, but the config holds a mapping"),
        ({"model.blocks.other": 3}, r"adds a block, which must be a mapping"),
    ],
)
def test_wrong_overrides_name_value_place_and_nearest(change, words):
    with pytest.raises(ConfigError, match=words):
        overrides.apply(base_lm.get_config(), change, "test")


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("train.steps", "50", 50),
        ("optimizer.learning_rate", "1e-3", 1e-3),
        ("optimizer.learning_rate", "1", 1.0),
        ("data.packing", "false", False),
        ("data.name", "c4", "c4"),
        ("model.pattern", "dense,dense", ("dense", "dense")),
        ("model.pattern", "('moe',)", ("moe",)),
        ("optimizer", "{'kind': 'adamw', 'learning_rate': 1.0}", {"kind": "adamw", "learning_rate": 1.0}),
        ("model.blocks.moe.ffn.new", "3", 3),
        ("model.blocks.moe.ffn.new", "true", True),
        ("model.blocks.moe.ffn.new", "word", "word"),
        ("model.blocks.moe.ffn.new", "none", None),
    ],
)
def test_text_becomes_the_type_that_the_config_holds(key, text, value):
    found = overrides.parse(base_lm.get_config(), key, text, "test")
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("key", "text", "words"),
    [
        ("train.steps", "1.5", r"train\.steps='1\.5' in test is not an int; the config holds 300"),
        ("data.packing", "maybe", "is not true or false; the config holds True"),
        ("optimizer.learning_rate", "fast", "is not a float"),
        ("model.pattern", "(1, 2)", "is not a tuple"),
        ("optimizer", "adamw", "is not a mapping"),
    ],
)
def test_text_of_the_wrong_type_is_refused(key, text, words):
    with pytest.raises(ConfigError, match=words):
        overrides.parse(base_lm.get_config(), key, text, "test")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"claims": (lower("m", "swich", "dense", headline=True, matched=()),)},
            r"claims\[0\] .*'swich'; did you mean 'switch'",
        ),
        ({"claims": (lower("m", "switch", "dense", matched=()),)}, "0 headline claims; exactly one"),
        ({"claims": CLAIM * 2}, "2 headline claims; exactly one"),
        ({"claims": (lower("m", "roomy", "dense", headline=True, matched=()),)}, "headline claim .* names an ablation's arm"),
        (
            {
                "claims": (below("stats/drop_rate", "free", 0.1, headline=True),),
                "arms": (Arm("free", {SELECT: {"kind": "top_k", "k": 1}}), *ARMS),
            },
            "nothing is dropped where no capacity is set",
        ),
        (
            {
                "claims": (below("eval/stats/drop_rate", "late", 0.1, headline=True),),
                "arms": (Arm("late", {SELECT: LATE}), *ARMS),
            },
            "nothing is dropped where no capacity is set",
        ),
        (
            {
                "claims": (within("eval/stats/max_violation", "chosen", "other", 0.1, headline=True, matched=()),),
                "arms": (Arm("chosen", {SELECT: CHOICE}), Arm("other", {SELECT: CHOICE}), *ARMS),
            },
            "all take equally many",
        ),
        ({"arms": (Arm("dense"), Arm("switch"), Arm("dense")), "claims": CLAIM}, "2 arms called 'dense'"),
        ({"arms": (Arm("dense"), Arm("switch"), Arm("roomy")), "claims": CLAIM}, "2 arms called 'roomy'"),
        ({"arms": (Arm("a,b"),)}, "name 'a,b' .* may only have letters"),
        ({"arms": (), "ablations": {}}, "has no arms"),
        (
            {"arms": (Arm("dense"), Arm("switch", {"model.d_modle": 3})), "claims": CLAIM},
            "arm 'switch'.*did you mean 'd_model'",
        ),
        ({"presets": {"cpu": Preset()}}, "has no 'smoke' preset"),
        (
            {"presets": {"smoke": Preset(), "cpu": Preset(looks=(1,))}},
            "a look at one seed in preset 'cpu' of study 'toy' decides nothing",
        ),
        (
            {"claims": (lower("m", "switch", "dense", headline=True),)},
            r"claims\[0\] .* does not say what they must have equally; give matched=",
        ),
        ({"presets": {"smoke": Preset(), "large": Preset()}}, "unknown preset 'large'"),
        ({"presets": {"smoke": Preset({"train.step": 1})}}, "preset 'smoke' of study 'toy'.*did you mean 'steps'"),
        ({"presets": {"smoke": Preset(arms={"swich": {}})}}, "unknown arm 'swich' .*did you mean 'switch'"),
        ({"base": base_lm.get_config}, "not a ConfigDict; call get_config"),
    ],
)
def test_a_study_that_does_not_fit_is_refused_when_it_is_made(changes, words):
    with pytest.raises(ConfigError, match=words):
        make_study(**changes)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: within("m", "a", "b", 0.0), "says nothing, or cannot be"),
        (lambda: Claim(Speedup("m", "a", "b")), "says nothing, or cannot be"),
        (lambda: lower("m", "a", "b", matched=("flop",)), "matched='flop'; did you mean 'flops'"),
        (lambda: lower("m", "a", "a"), "it compares a with itself; what holds by construction is a test"),
        (lambda: lower("m", mean("a", "a"), "b"), "name one or more arms, each once"),
        (lambda: trend("m", {0: "a", 1: "b"}, log=True, high=0), "in the logarithm of 0"),
        (lambda: trend("m", {1: "a"}, high=0), "needs 2 or more arms"),
        (lambda: optimum("m", {1: "a", 2: "b"}, high=2), "needs 3 or more arms"),
        (lambda: Preset(looks=(4, 4)), r"looks=\(4, 4\) of a preset: rising numbers of seeds"),
        (lambda: Preset(headline_looks=(1, 4)), "headline_looks="),
    ],
)
def test_claims_that_say_nothing_are_refused(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


def test_claims_read_as_sentences():
    assert lower("m", "a", "b", by=0.02).sentence == "m of a - b < -0.02"
    assert higher("m", "a", "b").sentence == "m of a - b > 0"
    assert within("m", "a", "b", 0.1).sentence == "m of a - b between -0.1 and 0.1"
    assert above("m", "a", 3).sentence == "m of a > 3"
    assert below("m", "a", 3, text="small").sentence == "small"
    assert faster("m", "a", "b", by=2).sentence == "steps of b / steps of a to equal m > 2"
    assert lower("m", lowest("a", "b"), mean("c", "d")).sentence == "m of the lowest of a, b - the mean of c, d < 0"
    assert changes_less("m", ("a", "b"), ("c", "d")).sentence == "(m of b - a) - (m of d - c) < 0"
    assert trend("m", {2: "a", 4: "b"}, high=0, log=True).sentence == "slope of m per doubling along a (2), b (4) < 0"
    assert sooner("m", "a", "b", 0.5, by=2).sentence == "steps of b until m is 0.5 / steps of a until m is 0.5 > 2"
    assert gains("m", "a", 3.0, {1: "b", 2: "c"}).sentence == "cost of b, c for m of a / its cost 3 > 1"


def test_studies_are_found_by_file_name_and_only_the_wanted_one_is_imported(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "ROOT", tmp_path)
    for name, source in {"toy": SOURCE.format(slug="toy"), "other": "raise RuntimeError('imported')"}.items():
        (tmp_path / "family").mkdir(exist_ok=True)
        (tmp_path / "family" / f"{name}.py").write_text(source)
    (tmp_path / "family" / "_helper.py").write_text("")
    (tmp_path / "family" / "wrong.py").write_text(SOURCE.format(slug="toy"))
    (tmp_path / "family" / "empty.py").write_text("")
    assert set(study.study_files()) == {"toy", "other", "wrong", "empty"}
    assert study.load("toy").slug == "toy"
    with pytest.raises(ConfigError, match=r"unknown study 'tooy'.*did you mean 'toy'"):
        study.load("tooy")
    with pytest.raises(ConfigError, match=r"slug 'toy' in family/wrong\.py differs"):
        study.load("wrong")
    with pytest.raises(ConfigError, match="holds no STUDY"):
        study.load("empty")


@pytest.mark.parametrize("module", [base_lm, base_vit])
def test_base_configs_build_their_models(module):
    from moejax import models

    config = module.get_config()
    assert models.build(config.model).num_layers == config.model.num_layers
    config.model.blocks.dense.mixer.num_heads = 1
    assert config.model.blocks.moe.mixer.num_heads == 4


def test_statistics_that_may_come_out_either_way_are_claimed():
    arms = (Arm("chosen", {SELECT: CHOICE}), *ARMS)
    claims = (
        lower("eval/stats/max_violation", "chosen", "switch", headline=True, matched=()),
        below("stats/drop_rate", "switch", 0.1),
        below("stats/drop_rate", "late", 0.1),
    )
    assert len(make_study(arms=(*arms, Arm("late", {SELECT: LATE})), claims=claims, ablations={}).claims) == 3


@pytest.mark.parametrize(
    ("suspect", "key", "here", "there"),
    [
        ("scale", "model.d_model", 128, 1024),
        ("optimizer", "optimizer.learning_rate", 3e-3, 1e-2),
        ("decay", "optimizer.weight_decay", 0.1, 0.0),
        ("capacity", f"{SELECT}.capacity_factor", 1.25, 2.0),
        ("method", "model.blocks.moe.ffn.losses.balance.coef", 0.01, 0.1),
        (
            "init",
            "model.blocks.moe.ffn.router",
            {"kind": "linear"},
            {"kind": "linear", "init_w": {"kind": "normal", "std": 0.1}},
        ),
    ],
)
def test_a_departure_that_configs_tell_must_be_said(suspect, key, here, there):
    presets = {"smoke": Preset(), "cpu": Preset({key: here}), "paper": Preset({key: there})}
    told = f"{list(there.values())[1]['kind']!r}" if isinstance(there, dict) else repr(there)
    words = rf"say {suspect}='none', but {key}.* at preset 'cpu' and {told} at 'paper' \(arm 'dense'\)"
    with pytest.raises(ConfigError, match=words):
        make_study(presets=presets, departures=Departures(**SAID | {suspect: "none"}))
    assert make_study(presets=presets, departures=Departures(**SAID)).departures.items() == tuple(SAID.items())


def test_a_departure_in_one_arm_is_one_of_the_study():
    arms = (Arm("dense"), Arm("switch", {"model.blocks.moe.ffn.losses.z.coef": 0.5}))
    presets = {
        "smoke": Preset(),
        "cpu": Preset(),
        "paper": Preset(arms={"switch": {"model.blocks.moe.ffn.losses.z.coef": 0.1}}),
    }
    with pytest.raises(ConfigError, match=r"method='none', but .*losses\.z\.coef is 0\.5 .* and 0\.1 .*arm 'switch'"):
        make_study(arms=arms, claims=CLAIM, ablations={}, presets=presets, departures=Departures(**SAID | {"method": "none"}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"departures": None}, "has arxiv='2101.03961'"),
        ({"arxiv": ""}, "has arxiv=''"),
    ],
)
def test_what_is_of_a_paper_says_its_departures_and_nothing_else_does(change, words):
    with pytest.raises(ConfigError, match=words):
        make_study(**change)
    assert make_study(arxiv="", departures=None).departures is None


def test_an_empty_departure_is_refused():
    with pytest.raises(ConfigError, match="decay is empty; write what departs from the paper, or 'none'"):
        Departures(**SAID | {"decay": " "})


def test_where_a_run_computes_is_no_departure():
    assert suspect_of("mesh") == suspect_of("exchange.kind") == ""
    assert suspect_of("init.source.config") == "scale"
    assert suspect_of("model.blocks.moe.ffn.bank.init_in.std") == "init"
