"""Which run is which: a folder answers only the question that it was trained for, and goes on under what numbers do not depend on."""

import functools
import json

import flax.linen as nn
import jax
import numpy as np
import pytest
from training_harness import INIT, VOCAB, TinyLM, TinyText, run_tiny

import moejax as mj
from moejax.core.errors import ConfigError
from moejax.train import described, essence, files


class Crash(RuntimeError):
    pass


class Crashing(TinyText):
    """Breaks off after six batches, when the third step has been saved."""

    def __next__(self):
        if self.shuffle and self.done == 6:
            raise Crash
        return super().__next__()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished")
    return workdir, run_tiny(workdir)


@pytest.fixture(scope="module")
def cut_off(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("cut_off")
    with pytest.raises(Crash):
        run_tiny(workdir, make_iterator=Crashing)
    return workdir


OTHERS = [
    ({"eval__split": "train"}, r"eval.split=None, not 'train'"),
    ({"eval__batches": 2}, r"eval.batches=3, not 2"),
    ({"train__accumulation": 2}, r"train.accumulation=None, not 2"),
    ({"train__steps": 16}, r"train.steps=8, in which their learning rates were not those of 16 steps"),
    ({"model": TinyLM(balance=0.25)}, r"model.balance=0.5, not 0.25 \(given to `fit` by hand\)"),
    ({"model": TinyLM(layers=2)}, r"model.layers=1, not 2"),
    ({"exchange": {"bound": 2.0}}, r"exchange.bound=None, not 2.0"),
]


@pytest.mark.parametrize(("changes", "message"), OTHERS)
def test_another_question_is_not_answered_by_a_finished_run(finished, changes, message):
    with pytest.raises(ConfigError, match=message):
        run_tiny(finished[0], **changes)


@pytest.mark.parametrize(("changes", "message"), OTHERS)
def test_another_run_does_not_go_on_from_one_that_was_cut_off(cut_off, changes, message):
    with pytest.raises(ConfigError, match=message):
        run_tiny(cut_off, **changes)


def test_other_data_are_noticed_by_their_first_batch(cut_off):
    class Other(TinyText):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.corpus["tokens"] = self.corpus["tokens"][:, ::-1]

    with pytest.raises(ConfigError, match="began with another batch of data"):
        run_tiny(cut_off, make_iterator=Other)


def test_what_numbers_do_not_depend_on_may_change(finished, cut_off):
    changes = {
        "data__workers": 2,
        "data__prefetch": 9,
        "data__data_dir": "elsewhere",
        "checkpoint__every": 5,
        "model__remat": "full",
    }
    asked = []

    def recorded(*args, **kwargs):
        asked.append(args)
        return TinyText(*args, **kwargs)

    result = run_tiny(cut_off, make_iterator=recorded, **changes)
    assert asked
    jax.tree.map(np.testing.assert_array_equal, result.variables, finished[1].variables)
    assert result.history == finished[1].history
    asked.clear()
    again = run_tiny(finished[0], make_iterator=recorded, **changes)
    assert not asked
    assert again.metrics == finished[1].metrics


def test_a_run_grows_longer_where_its_learning_rates_stay(tmp_path):
    constant = {"optimizer__schedule": "constant", "eval__every": 0}
    whole = run_tiny(tmp_path / "whole", train__steps=8, **constant)
    run_tiny(tmp_path / "grown", train__steps=4, **constant)
    grown = run_tiny(tmp_path / "grown", train__steps=8, **constant)
    jax.tree.map(np.testing.assert_array_equal, grown.variables, whole.variables)
    half = {"trainable": {"all": {"what": "*", "since": 0.5}}, "optimizer__warmup_steps": 0, **constant}
    run_tiny(tmp_path / "phases", train__steps=2, **half)
    with pytest.raises(ConfigError, match=r"holds a run with steps of trainable.all=\(1, 2\), not \(2, 2\)"):
        run_tiny(tmp_path / "phases", train__steps=4, **half)


@pytest.mark.parametrize("seed", [2**32, -1, True])
def test_what_is_no_seed_is_refused(tmp_path, seed):
    """JAX would take 2**32 for 0, and the data would not."""
    with pytest.raises(ConfigError, match=r"seed=.* must be a whole number between 0 and 4294967295"):
        run_tiny(tmp_path, seed=seed)
    with pytest.raises(ConfigError, match=r"seed=.* must be a whole number"):
        mj.Random(num_experts=2, eval_seed=seed)


def test_how_a_model_computes_is_no_part_of_it_and_what_it_computes_is():
    sections = {"data": {"name": "x"}, "task": {}, "optimizer": {}, "train": {"steps": 3}}

    def of(**ffn):
        return essence({**sections, "model": {"remat": "full", "blocks": {"moe": {"ffn": ffn}}}})

    assert of(k=1, backend="grouped", experts={"implementation": "xla"}) == of(k=1, experts={})
    assert of(k=1) != of(k=2)
    assert essence({**sections, "model": {}, "eval": {"every": 0}}) == essence({**sections, "model": {}})
    bounded = {**sections, "model": {}, "exchange": {"bound": 1.0}}
    assert essence({**bounded, "mesh": "ep"}) != essence({**bounded, "mesh": "dp"})


def test_files_count_by_what_is_in_them(tmp_path):
    path = tmp_path / "words.json"
    config = {"init": {"source": {"kind": "run", "config": {"data": {"tokenizer": str(path)}}}}}
    assert files(config) == {}
    found = []
    for text in ("a", "b"):
        path.write_text(text)
        found.append(files(config))
    assert [list(one) for one in found] == [["init.source.config.data.tokenizer"]] * 2
    assert found[0] != found[1]


class Layer(nn.Module):
    init: object = INIT
    act: object = nn.gelu
    table: object = None


def test_a_model_by_hand_is_described_by_all_that_it_is_made_of():
    given = [
        Layer(),
        Layer(init=nn.initializers.uniform(0.5)),
        Layer(act=nn.relu),
        Layer(act=functools.partial(nn.gelu, approximate=False)),
        Layer(act=lambda x: x + VOCAB),
        Layer(act=lambda x: x * VOCAB),
        Layer(table=np.arange(3)),
        Layer(table=np.arange(1, 4)),
        Layer(table=Layer()),
    ]
    texts = [json.dumps(described(one), sort_keys=True) for one in given]
    assert len(set(texts)) == len(given)
    assert texts[0] == json.dumps(described(Layer(init=nn.initializers.uniform(0.6))), sort_keys=True)
    assert " at 0x" not in "".join(texts)
