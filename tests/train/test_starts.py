"""Runs that start from others: what they start with, to the bit; who trains what, once; kills, resumption and refusals."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_harness import TinyLM, TinyText, registered, run_tiny, tiny_config

from moejax.core.errors import ConfigError
from moejax.models.registry import models
from moejax.surgery.base import spelt, surgeries
from moejax.train import NonFiniteLoss, load
from moejax.train.identity import essence
from moejax.train.same_run import check_same_run
from moejax.train.settings import normalized, plain

ROOT = Path(__file__).parents[2]


def start_config(**changes):
    """The run that others start from: six steps, another schedule."""
    return tiny_config(**{"train__steps": 6, "optimizer__learning_rate": 0.03, "eval__every": 0, **changes}).to_dict()


def source(seed="own", **changes):
    return {"kind": "run", "config": start_config(**changes), "seed": seed}


def arrays(checkpoint_or_variables):
    variables = getattr(checkpoint_or_variables, "variables", checkpoint_or_variables)
    return {
        "/".join(str(k.key) for k in path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(dict(variables))
    }


def assert_same(a, b):
    a, b = arrays(a), arrays(b)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


class Starts:
    """A resolver that remembers what it was asked for, and keeps finished runs in one folder."""

    def __init__(self, folder):
        self.folder, self.asked, self.trained = folder, [], []

    def __call__(self, config, seed, progress, label):
        config = plain(config)
        self.asked.append((label, seed))
        text = json.dumps(essence(config), sort_keys=True)
        workdir = self.folder / f"{abs(hash(text))}-{seed}"
        if not (workdir / "result.json").exists():
            self.trained.append((label, seed))
            dotted = {key.replace(".", "__"): value for key, value in _flat(config).items()}
            run_tiny(workdir, seed, progress=progress, resolve=self, **dotted)
        return workdir


def _flat(config):
    return {f"{name}.{key}": value for name, section in config.items() for key, value in section.items()}


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    return Starts(tmp_path_factory.mktemp("starts"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A finished run to start from."""
    workdir = tmp_path_factory.mktemp("base")
    return workdir, run_tiny(workdir, seed=1, **{k.replace(".", "__"): v for k, v in _flat(start_config()).items()})


def evaluated(tmp_path, seed=0, resolve=None, **init):
    """A run of no steps: what it starts with, as its result."""
    return run_tiny(tmp_path, seed, train__steps=0, eval__batches=0, init=init, resolve=resolve)


def test_a_run_starts_with_every_array_of_the_run_of_another_config(base, starts, tmp_path):
    found = evaluated(tmp_path / "run", seed=1, resolve=starts, source=source())
    assert_same(found.variables, base[1].variables)
    assert np.abs(arrays(found.variables)["router_state/layer_0/load"]).max() > 0
    assert found.steps == 0
    assert [line["step"] for line in found.history] == [0]
    again = evaluated(tmp_path / "again", seed=4, source={"kind": "checkpoint", "path": str(base[0])})
    assert_same(again.variables, base[1].variables)
    assert again.metrics == found.metrics
    # What has ended is read.
    assert evaluated(tmp_path / "run", seed=1, resolve=None, source=source()).metrics == found.metrics


def test_a_checkpoint_of_any_step_by_its_run_or_by_its_own_folder(base, tmp_path):
    by_step = evaluated(tmp_path / "a", source={"kind": "checkpoint", "path": str(base[0]), "step": 3})
    by_path = evaluated(tmp_path / "b", source={"kind": "checkpoint", "path": f"{base[0]}/checkpoints/3"})
    assert_same(by_step.variables, load(base[0], 3))
    assert_same(by_path.variables, load(base[0], 3))
    with pytest.raises(ConfigError, match=r"init.source.path='.*base.*': no checkpoint 5 .* there are \[3, 6\]"):
        evaluated(tmp_path / "c", source={"kind": "checkpoint", "path": str(base[0]), "step": 5})


def test_training_goes_on_from_there_with_its_own_schedule_and_seed(base, starts, tmp_path):
    tuned = run_tiny(tmp_path, seed=1, train__steps=4, train__log_every=1, init={"source": source()}, resolve=starts)
    fresh = run_tiny(tmp_path / "fresh", seed=1, train__steps=4, train__log_every=1)
    assert tuned.history[0]["train/learning_rate"] == fresh.history[0]["train/learning_rate"]
    assert tuned.history[0]["train/loss"] < fresh.history[0]["train/loss"] - 0.05
    assert starts.trained.count(("init.source of tiny", 1)) == 1
    before, after = arrays(base[1].variables), arrays(tuned.variables)
    assert all((before[name] != after[name]).any() for name in before)


def test_one_start_is_trained_once_for_all_and_once_a_seed(tmp_path):
    starts = Starts(tmp_path)
    for seed in (0, 1):
        for i, rate in enumerate((0.01, 0.02)):
            init = {"source": source(seed=7), "others": {"own": source()}}
            run_tiny(
                tmp_path / f"{seed}{i}",
                seed,
                train__steps=0,
                init=init,
                resolve=starts,
                optimizer__learning_rate=rate,
                eval__batches=1,
            )
    assert [(label, seed) for label, seed in starts.trained] == [
        ("init.source of tiny", 7),
        ("init.others.own of tiny", 0),
        ("init.others.own of tiny", 1),
    ]
    assert len(starts.asked) == 8


def test_without_a_resolver_starts_are_trained_below_the_work_folder_and_shared(tmp_path):
    middle = start_config(init={"source": source(), "others": {"first": source()}}, train__steps=2)
    reports = []
    init = {"source": {"kind": "run", "config": middle}, "others": {"first": source(train__log_every=5)}}
    found = run_tiny(tmp_path, train__steps=2, init=init, progress=reports.append)
    # Two runs: the first one of all, which three name, and the one in the middle. What only logs otherwise is the same run.
    folders = list((tmp_path / "starts").iterdir())
    assert len(folders) == 2
    assert not list((tmp_path / "starts").glob("*/starts"))
    labels = list(dict.fromkeys(report.label for report in reports))
    assert labels == ["tiny", "init.source of tiny", "init.source of init.source of tiny"]
    assert found.first_step_seconds < found.seconds + 1


def test_new_parts_are_those_of_a_fresh_run_and_the_rest_is_the_start(base, tmp_path):
    """The head is cut off and made anew; the average of two starts is that of their arrays."""
    fresh = run_tiny(tmp_path / "fresh", seed=3, train__steps=2, optimizer__learning_rate=0.0)
    surgeries = {
        "mean": {"kind": "average"},
        "cut": {"kind": "keep", "without": ("head",)},
        "new": {"kind": "extend", "paths": ("head",)},
    }
    checkpoint = {"kind": "checkpoint", "path": str(base[0])}
    others = {"early": {**checkpoint, "step": 3}}
    order = ("mean", "cut", "new")
    found = arrays(evaluated(tmp_path / "x", 3, source=checkpoint, others=others, surgeries=surgeries, order=order).variables)
    a, b, new = arrays(base[1].variables), arrays(load(base[0], 3)), arrays(fresh.variables)
    for name, x in found.items():
        if "/head/" in name:
            np.testing.assert_array_equal(x, new[name])
        elif name.startswith("params"):
            np.testing.assert_allclose(x, (a[name] + b[name]) / 2, rtol=1e-6)
        else:
            np.testing.assert_array_equal(x, a[name])


def test_what_is_missing_or_left_over_is_an_error(base, tmp_path):
    checkpoint = {"kind": "checkpoint", "path": str(base[0])}
    with pytest.raises(
        ConfigError, match=r"init: the arrays are not those of the model: 5 missing .*layer_1/b_in float32\[3,8\]"
    ):
        run_tiny(tmp_path / "a", model=TinyLM(layers=2), init={"source": checkpoint})
    with pytest.raises(ConfigError, match=r"embedding float32\[11,8\], where the model has float32\[11,16\]"):
        run_tiny(tmp_path / "b", model=TinyLM(width=16), init={"source": checkpoint})
    with pytest.raises(ConfigError, match=r"2 missing \(head/bias float32\[11\], head/kernel"):
        run_tiny(tmp_path / "c", init={"source": checkpoint, "surgeries": {"keep": {"without": ("head",)}}})
    with pytest.raises(ConfigError, match=r"'haed' in keep.without matches no parameter; .*\(in init.surgeries.keep\)"):
        run_tiny(tmp_path / "d", init={"source": checkpoint, "surgeries": {"keep": {"without": ("haed",)}}})


def test_what_is_wrong_with_the_run_itself_is_said_before_its_start_is_trained(tmp_path):
    def never(*args):
        raise AssertionError("trained")

    with pytest.raises(ConfigError, match=r"'norn' in trainable\.norn\.what"):
        run_tiny(tmp_path, init={"source": source()}, trainable={"norn": {}}, resolve=never)


def test_a_start_that_will_not_fit_is_not_trained(tmp_path):
    def never(*args):
        raise AssertionError("trained")

    class Wide(TinyLM):
        width: int = 16

    with registered(models, "toy_wide", Wide):
        other = {**source(), "config": {**start_config(), "model": {"kind": "toy_wide"}}}
        with pytest.raises(ConfigError, match=r"embedding float32\[11,16\], where the model has float32\[11,8\]"):
            run_tiny(tmp_path, init={"source": other}, resolve=never)


def test_a_fresh_run_of_no_steps_is_refused_however_it_says_so(tmp_path):
    for init in ({}, {"source": {"kind": "fresh"}}, {"source": {"kind": "fresh"}, "others": {"x": None}, "surgeries": {}}):
        with pytest.raises(ConfigError, match=r"train\.steps=0 must be a whole number of at least 1 unless"):
            run_tiny(tmp_path, train__steps=0, init=init)


class Copy(nn.Module):
    """A user's adapter: it starts from the array that it adapts, keeps state, and changes nothing at the start."""

    role = "adapters"

    @nn.compact
    def __call__(self, x, array):
        start = self.param("start", lambda key: jnp.asarray(array, jnp.float32))
        down = self.param("down", nn.initializers.zeros, (VOCAB_SIZE,))
        self.variable("router_state", "seen", lambda: jnp.ones(()))
        return x + (array - start).sum() + down


class Adapted(TinyLM):
    @nn.compact
    def __call__(self, tokens, ctx):
        y = super().__call__(tokens, ctx)
        return Copy(name="copy")(y, self.variables["params"]["head"]["kernel"])


@pytest.mark.parametrize("mesh", ["", "data=4,fsdp=2"])
def test_adapters_are_new_without_saying_so_and_start_from_what_they_adapt(base, tmp_path, mesh):
    checkpoint = {"kind": "checkpoint", "path": str(base[0])}
    changes = {"model": Adapted(noise=0.0), "init": {"source": checkpoint}, "mesh": mesh, "data__batch_size": 8}
    start = run_tiny(tmp_path / "start", train__steps=0, eval__batches=0, **changes)
    without = evaluated(tmp_path / "without", source=checkpoint)
    assert start.metrics["eval/loss"] == pytest.approx(without.metrics["eval/loss"], rel=1e-5)
    found = run_tiny(tmp_path / "tuned", train__steps=2, trainable={"adapters": {}}, **changes)
    before, after = arrays(base[1].variables), arrays(jax.device_get(found.variables))
    assert set(after) - set(before) == {"params/copy/start", "params/copy/down", "router_state/copy/seen"}
    for name, x in before.items():
        if name.startswith("params"):
            np.testing.assert_array_equal(after[name], x)
    np.testing.assert_array_equal(arrays(jax.device_get(start.variables))["params/copy/start"], before["params/head/kernel"])
    assert np.abs(after["params/copy/down"]).max() > 0
    assert found.trainable_params == before["params/head/kernel"].size + VOCAB_SIZE


VOCAB_SIZE = 11


def test_a_start_that_diverged_ends_the_run_as_diverged(tmp_path):
    bad = source(optimizer__learning_rate=1e30, optimizer__clip_norm=None)
    with pytest.raises(NonFiniteLoss):
        run_tiny(tmp_path, init={"source": bad})


class TestIdentity:
    def same(self, before, after):
        sections = {"model": {}, "data": {}, "task": {}, "optimizer": {}, "train": {"steps": 3}}
        plains = [plain(normalized({**sections, **config})) for config in (before, after)]
        with contextlib.suppress(ConfigError):
            check_same_run(*plains, "here")
            return True
        return False

    def test_saying_what_is_so_anyway_changes_nothing(self):
        nothing = {"init": {"source": {"kind": "fresh"}, "others": {}, "surgeries": {}, "order": ()}, "trainable": {}}
        assert self.same({}, nothing)
        assert self.same({}, {"init": None, "trainable": {"norms": None}})

    @pytest.mark.parametrize(
        ("before", "after"),
        [
            ({}, {"trainable": {"norms": {}}}),
            ({"trainable": {"norms": {}}}, {"trainable": {"biases": {}}}),
            ({}, {"init": {"source": {"kind": "checkpoint", "path": "x"}}}),
            ({"init": {"source": source(0)}}, {"init": {"source": source(1)}}),
            ({"init": {"source": source()}}, {"init": {"source": source(train__steps=7)}}),
            ({"init": {"source": source()}}, {"init": {"source": source(), "surgeries": {"keep": {}}}}),
        ],
    )
    def test_another_start_or_another_rule_is_another_run(self, before, after):
        assert self.same(before, before)
        assert not self.same(before, after)

    def test_where_and_how_often_the_start_logs_is_no_part_of_it(self):
        assert self.same(
            {"init": {"source": source()}}, {"init": {"source": source(mesh="dp", checkpoint__every=1, train__log_every=1)}}
        )


class Crash(RuntimeError):
    pass


def crashing(at, of_size):
    """Data that break off at batch `at` of the run whose batches have this size."""

    class Crashing(TinyText):
        def __next__(self):
            if self.shuffle and self.size == of_size and self.done == at:
                raise Crash
            return super().__next__()

    return Crashing


def test_runs_cut_off_in_the_start_and_after_it_end_with_the_same_bits(tmp_path):
    init = {"source": source(data__batch_size=3)}
    whole = run_tiny(tmp_path / "whole", init=init)
    for at, of_size in ((4, 3), (5, 4)):
        with pytest.raises(Crash):
            run_tiny(tmp_path / "cut", init=init, make_iterator=crashing(at, of_size))
    # Once the run has a checkpoint of its own, what it started from is asked for no more.
    shutil.rmtree(tmp_path / "cut" / "starts")
    end = run_tiny(tmp_path / "cut", init=init)
    assert not (tmp_path / "cut" / "starts").exists()
    assert_same(end.variables, whole.variables)
    assert (tmp_path / "cut/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


@pytest.mark.slow
def test_processes_killed_in_the_start_and_after_it_end_with_the_same_bits(tmp_path):
    """The start takes 20 batches of 3 rows, the run itself 12 of 4."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    init = {"source": source(data__batch_size=3, train__steps=20, checkpoint__every=4, checkpoint__asynchronous=False)}
    changes = json.dumps({"train__steps": 12, "eval__every": 0, "checkpoint__asynchronous": False, "init": init})

    def train(workdir, kill_at):
        command = [sys.executable, str(ROOT / "tests/training_harness.py"), str(workdir), changes, str(kill_at)]
        return subprocess.run(command, env=environment, capture_output=True, timeout=300, check=False).returncode

    # Only the start gets to batch 15; in the second process it is past that, and the run itself gets to batch 8 for the first time.
    assert train(tmp_path / "cut", 15) == -signal.SIGKILL
    assert not (tmp_path / "cut/checkpoints/3").exists()
    assert train(tmp_path / "cut", 8) == -signal.SIGKILL
    assert (tmp_path / "cut/checkpoints/6").exists()
    assert train(tmp_path / "cut", 0) == 0
    assert train(tmp_path / "whole", 0) == 0
    assert_same(load(tmp_path / "cut"), load(tmp_path / "whole"))
    assert (tmp_path / "cut/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


def test_a_start_trained_on_one_device_is_gone_on_with_on_eight(base, tmp_path):
    init = {
        "source": {"kind": "checkpoint", "path": str(base[0])},
        "surgeries": {"keep": {"without": ("head",)}, "extend": {"paths": ("head",)}},
    }
    init["order"] = ("keep", "extend")
    changes = {"train__steps": 3, "data__batch_size": 8, "init": init, "trainable": {"norms": {}, "head": {"what": "head"}}}
    alone = run_tiny(tmp_path / "one", model=TinyLM(noise=0.0), **changes)
    together = run_tiny(tmp_path / "eight", model=TinyLM(noise=0.0), mesh="data=4,fsdp=2", **changes)
    one, eight = arrays(alone.variables), arrays(jax.device_get(together.variables))
    for name, x in one.items():
        np.testing.assert_allclose(eight[name], x, rtol=1e-3, atol=1e-5)
    before = arrays(base[1].variables)
    np.testing.assert_array_equal(eight["params/layer_0/w_in"], before["params/layer_0/w_in"])


def test_surgeries_see_calibration_data_keys_and_the_target(base, tmp_path):
    seen = []

    @dataclasses.dataclass(frozen=True)
    class Look:
        def __call__(self, checkpoint, target):
            seen.append((target, target.batches(2)))
            return checkpoint

    checkpoint = {"kind": "checkpoint", "path": str(base[0])}
    with registered(surgeries, "toy_look", Look):
        for seed in (0, 1):
            evaluated(tmp_path / str(seed), seed, source=checkpoint, surgeries={"toy_look": {}})
    (first, batches), (second, _) = seen
    assert [batch["tokens"].shape for batch in batches] == [(4, 6), (4, 6)]
    expected = TinyText({"batch_size": 4}, "train", seed=0)
    np.testing.assert_array_equal(batches[1]["tokens"], [next(expected), next(expected)][1]["tokens"])
    assert not np.array_equal(jax.random.key_data(first.key), jax.random.key_data(second.key))
    assert {spelt(path): x.shape for path, x in first.leaves.items()}["head/kernel"] == (8, VOCAB_SIZE)
    assert first.parameters["norm"]["scale"].roles == {"norms"}
    assert first.config["train"]["steps"] == 0
