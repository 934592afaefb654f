"""`fit` from end to end on a tiny model: results, resuming, errors."""

import contextlib
import errno
import json
import os
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_harness import Info, TinyLM, TinyText, device, run_tiny

from moejax.core.errors import ConfigError
from moejax.core.files import Damaged
from moejax.tasks.base import tasks
from moejax.train import NonFiniteLoss, fit, load, program
from moejax.train.checkpoints import Checkpoints, SaveFailed


class Crash(RuntimeError):
    pass


def crashing(at):
    """A `make_iterator` whose training data breaks off at batch `at`."""

    class Crashing(TinyText):
        def __next__(self):
            if self.shuffle and self.done == at:
                raise Crash
            return super().__next__()

    return Crashing


def metrics_file(workdir):
    return (workdir / "metrics.jsonl").read_bytes()


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One uninterrupted run: its folder, result and progress reports."""
    workdir, reports = tmp_path_factory.mktemp("whole"), []
    return workdir, run_tiny(workdir, progress=reports.append), reports


def test_result_and_files(finished):
    workdir, result, _ = finished
    assert result.steps == 8
    assert [line["step"] for line in result.history] == [2, 4, 6, 8]
    assert [line["step"] for line in result.history if "eval/loss" in line] == [4, 8]
    # The last evaluation also in blocks, whose mean is the metric but for the jackknife's correction: batches are unequal.
    assert [line["step"] for line in result.history if "eval/loss/blocks" in line] == [8]
    assert np.mean(result.history[-1]["eval/loss/blocks"]) == pytest.approx(result.metrics["eval/loss"], rel=0.02)
    assert result.state_bytes > 4 * result.params
    assert result.tokens_per_step > 0
    assert result.params == result.active_params == sum(x.size for x in jax.tree.leaves(result.variables["params"]))
    # Forward and backward of the head alone, for 24 tokens.
    assert result.flops_per_step > 3 * 2 * 24 * 8 * 11
    assert 0 < result.first_step_seconds <= result.seconds
    first = result.history[0]
    assert {"train/loss", "train/bits_per_byte", "train/code/bits_per_byte", "losses/balance"} <= first.keys()
    assert len(first["stats/layer_0/load"]) == 3
    np.testing.assert_allclose(first["train/objective"], first["train/loss"] + first["losses/balance"], rtol=1e-6)
    written = json.loads((workdir / "result.json").read_text())
    assert written["metrics"] == result.metrics
    assert json.loads((workdir / "config.json").read_text())["train"]["steps"] == 8
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["3", "6", "8"]
    for name in ("metrics.jsonl", "timings.jsonl"):
        assert (workdir / name).exists()
    assert b"second" not in metrics_file(workdir)
    assert list(workdir.glob("events.out.tfevents.*"))


def test_progress_tells_the_phases_and_the_time_left(finished):
    _, result, reports = finished
    assert [r.phase for r in reports[:3]] == ["data", "compile", "train"]
    assert {r.phase for r in reports} == {"data", "compile", "train", "eval"}
    logged = [r for r in reports if r.tokens_per_second]
    assert [r.step for r in logged] == [2, 4, 6, 8]
    assert logged[-1].seconds_left == 0
    assert logged[0].seconds_left > 0
    assert logged[-1].loss == result.history[-1]["train/loss"]
    assert {r.label for r in reports} == {"tiny"}


def test_final_evaluation_is_one_pass_over_the_split_whatever_the_batch_size(finished, tmp_path):
    """Against one application of the model to all 24 rows at once, where `fit` takes 4 at a time."""
    _, variables, _ = load(finished[0])
    task = tasks.build({"kind": "next_token"}, "task", domains=Info.domains)
    everything = device(TinyText({"batch_size": 24}, "validation").corpus)
    inputs, ctx = task.inputs(everything, jnp.int32(8), train=False)
    logits, _ = TinyLM().apply(variables, inputs, ctx, mutable=["losses", "stats"])
    expected = task.metrics(jax.device_get(task.sums(logits, everything)))

    run_tiny(tmp_path, eval__batches=0, eval__every=0)
    whole = json.loads((tmp_path / "result.json").read_text())["metrics"]
    for name, value in expected.items():
        np.testing.assert_allclose(whole[f"eval/{name}"], value, rtol=1e-5)
    # Three batches are half of the split.
    assert finished[1].metrics["eval/loss"] != whole["eval/loss"]


def test_a_finished_run_is_read_and_not_repeated(finished):
    workdir, result, _ = finished

    def no_data(*args, **kwargs):
        raise AssertionError("a finished run asked for data")

    again = run_tiny(workdir, make_iterator=no_data)
    assert again.metrics == result.metrics
    assert again.history == result.history
    assert again.seconds == result.seconds
    assert_same(again.variables, result.variables)


@pytest.mark.parametrize("as_bytes", [False, True])
def test_a_run_that_crashed_twice_ends_with_the_same_bits(finished, tmp_path, as_bytes):
    workdir, result, _ = finished

    def with_state(cls):
        return lambda *args, **kwargs: cls(*args, as_bytes=as_bytes, **kwargs)

    for at in (5, 7):
        with pytest.raises(Crash):
            run_tiny(tmp_path, make_iterator=with_state(crashing(at)))
    # The second crash came after step 6 was logged and saved, so its metrics reach past the first checkpoint.
    end = run_tiny(tmp_path, make_iterator=with_state(TinyText))
    assert metrics_file(tmp_path) == metrics_file(workdir)
    assert_same(end.variables, result.variables)
    assert end.metrics == result.metrics


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(finished, tmp_path):
    workdir, result, _ = finished
    with pytest.raises(Crash):
        run_tiny(tmp_path, make_iterator=crashing(7))
    newest = tmp_path / "checkpoints" / "6"
    victim = max((f for f in newest.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 3] ^= 0xFF
    victim.write_bytes(content)
    with pytest.warns(Damaged, match=r"/6 is damaged"):
        end = run_tiny(tmp_path)
    assert (tmp_path / "checkpoints" / "6.corrupt").is_dir()
    assert metrics_file(tmp_path) == metrics_file(workdir)
    assert_same(end.variables, result.variables)


@pytest.mark.parametrize(
    ("name", "damage"),
    [("result.json", "a digit"), ("result.json", "emptied")]
    + [(name, damage) for name in ("metrics.jsonl", "timings.jsonl") for damage in ("a digit", "emptied", "removed")],
)
def test_what_a_finished_run_left_is_made_again_from_its_checkpoint(finished, tmp_path, name, damage):
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    text = (workdir / name).read_text()
    if damage == "removed":
        (workdir / name).unlink()
    else:
        # The first digit after a point: of a metric, or of a time.
        place = text.index(".", text.index(":")) + 1
        (workdir / name).write_text(
            "" if damage == "emptied" else text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :]
        )
    with pytest.warns(Damaged, match=r"result \S+/result\.json is damaged"):
        again = run_tiny(workdir, make_iterator=crashing(8))
    assert metrics_file(workdir) == metrics_file(finished[0])
    assert (workdir / "timings.jsonl").read_text() == (finished[0] / "timings.jsonl").read_text()
    assert (again.metrics, again.history) == (finished[1].metrics, finished[1].history)
    if name != "result.json" and damage != "removed":
        assert (workdir / f"{name}.corrupt").read_text() != text
    again = run_tiny(workdir, make_iterator=None)
    assert again.history == finished[1].history


@pytest.mark.parametrize("damage", ["cut", "emptied", "removed"])
def test_a_run_goes_on_whatever_became_of_its_log(finished, tmp_path, damage):
    with pytest.raises(Crash):
        run_tiny(tmp_path, make_iterator=crashing(7))
    for name in ("metrics.jsonl", "timings.jsonl"):
        file = tmp_path / name
        if damage == "removed":
            file.unlink()
        else:
            file.write_bytes(b"" if damage == "emptied" else file.read_bytes()[:-9])
    if damage == "cut":  # past the checkpoint at step 6, or of its last line: both are written again
        run_tiny(tmp_path)
    else:
        with pytest.warns(Damaged, match=r"log .*, made again from the checkpoint"):
            run_tiny(tmp_path)
    assert metrics_file(tmp_path) == metrics_file(finished[0])


def test_a_log_that_is_removed_while_the_run_writes_it_is_written_anew(finished, tmp_path):
    class Removing(TinyText):
        def __next__(self):
            if self.shuffle and self.done == 4:
                (tmp_path / "metrics.jsonl").unlink()
            return super().__next__()

    with pytest.warns(Damaged, match=r"metrics\.jsonl was removed while the run wrote it"):
        result = run_tiny(tmp_path, make_iterator=Removing)
    assert metrics_file(tmp_path) == metrics_file(finished[0])
    assert result.history == finished[1].history


def test_the_same_seed_gives_the_same_bits_and_another_does_not(finished, tmp_path):
    workdir, result, _ = finished
    again = run_tiny(tmp_path / "again")
    assert metrics_file(tmp_path / "again") == metrics_file(workdir)
    assert_same(again.variables, result.variables)
    other = run_tiny(tmp_path / "other", seed=1)
    for line, other_line in zip(result.history, other.history, strict=True):
        assert line["train/loss"] != other_line["train/loss"]


def test_seeds_of_one_config_share_one_compilation(finished, tmp_path, monkeypatch):
    def recompiled(*args, **kwargs):
        raise AssertionError("compiled again")

    monkeypatch.setattr(program, "make_train_step", recompiled)
    monkeypatch.setattr(program, "make_eval_step", recompiled)
    monkeypatch.setattr(program, "init_variables", recompiled)
    before = program._program.cache_info()
    run_tiny(tmp_path, seed=5)
    after = program._program.cache_info()
    assert (after.hits, after.misses) == (before.hits + 1, before.misses)
    assert after.maxsize == program.KEPT


def test_a_loss_that_is_not_finite_names_step_examples_and_checkpoint(tmp_path):
    class Exploding(TinyLM):
        """NaN for the batch whose positions are 99."""

        def __call__(self, tokens, ctx):
            return jnp.where((ctx.positions == 99).any(), jnp.nan, super().__call__(tokens, ctx))

    seen = []

    class Poison(TinyText):
        def __next__(self):
            batch = super().__next__()
            if self.shuffle and self.done == 5:
                seen[:] = batch["example_id"].tolist()
                batch["positions"] = batch["positions"] * 0 + 99
            return batch

    with pytest.raises(NonFiniteLoss) as error:
        run_tiny(tmp_path, model=Exploding(), make_iterator=Poison, train__log_every=4)
    message = str(error.value)
    assert "step 5" in message
    assert f"example_ids={seen}" in message
    assert f"{tmp_path}/checkpoints/3" in message
    assert (error.value.step, error.value.example_ids) == (5, seen)
    # Step 6 was due to be saved and was not.
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["3"]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(load(tmp_path)[1]))


def test_a_workdir_belongs_to_one_config_and_one_seed(finished):
    workdir, _, _ = finished
    with pytest.raises(ConfigError, match=r"holds a run with seed=0, not 3"):
        run_tiny(workdir, seed=3)
    with pytest.raises(ConfigError, match=r"holds a run with data.name='tiny', not 'large'"):
        run_tiny(workdir, data__name="large")
    with pytest.raises(ConfigError, match=r"train.steps=4 is less than the 8 steps"):
        run_tiny(workdir, train__steps=4)
    with pytest.raises(ConfigError, match=r"holds a run with model.width=8, not 16"):
        run_tiny(workdir, model=TinyLM(width=16))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__log_evry": 3}, "unknown key 'log_evry' in train; did you mean 'log_every'"),
        ({"train__steps": 0}, "train.steps=0 must be a whole number of at least 1"),
        ({"chekpoint": {"every": 3}}, "unknown section 'chekpoint' in the config; did you mean 'checkpoint'"),
        ({"checkpoint__keep": 0}, "checkpoint.keep=0"),
        ({"model__dtype": np.float32}, "made of mappings, lists, strings and numbers"),
    ],
)
def test_wrong_settings_are_named(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        run_tiny(tmp_path, **changes)


def test_a_config_lacking_a_section_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no section 'data'"):
        fit({"model": {}}, 0, tmp_path)


def test_two_trainings_in_one_folder_are_refused_and_neither_is_disturbed(finished, tmp_path):
    class Nosy(TinyText):
        def __next__(self):
            if self.shuffle and self.done == 5:
                with pytest.raises(ConfigError, match=rf"another training is under way in {tmp_path}; wait for it"):
                    run_tiny(tmp_path)
            return super().__next__()

    run_tiny(tmp_path, make_iterator=Nosy)
    assert metrics_file(tmp_path) == metrics_file(finished[0])
    run_tiny(tmp_path)  # the lock ended with the training


def test_an_error_leaves_no_lock(tmp_path):
    for _ in range(2):
        with pytest.raises(ConfigError, match="none of them"):
            run_tiny(tmp_path, optimizer__kind="none of them")


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_workdir_that_cannot_be_a_folder_is_told_in_one_line(tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"workdir=\S+ cannot be a folder to train in \((File exists|Not a directory)\)"):
        run_tiny(tmp_path / place)


@pytest.mark.parametrize("what", ["", "checkpoints"])
def test_a_folder_that_is_removed_while_the_run_trains_in_it_is_made_anew(finished, tmp_path, what):
    workdir = tmp_path / "run"

    class Removing(TinyText):
        def __next__(self):
            if self.shuffle and self.done == 5:
                shutil.rmtree(workdir / what, ignore_errors=True)
            return super().__next__()

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run_tiny(workdir, make_iterator=Removing)
    if not what:
        assert any("metrics.jsonl was removed while the run wrote it" in str(each.message) for each in told)
    assert metrics_file(workdir) == metrics_file(finished[0])
    assert_same(load(workdir).variables, finished[1].variables)
    assert run_tiny(workdir, make_iterator=None).history == finished[1].history


@pytest.mark.parametrize("last", [6, 8])
def test_a_save_that_fails_is_told_and_two_in_a_row_end_the_run(finished, tmp_path, monkeypatch, last):
    sign = Checkpoints._sign

    def full(self):
        if 6 <= self._signed <= last:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sign(self)

    monkeypatch.setattr(Checkpoints, "_sign", full)
    told = pytest.warns(
        Damaged, match=r"/6 could not be written: .*No space left on device.*; training goes on to the next one"
    )
    ends = pytest.raises(SaveFailed, match=r"^checkpoint \S+/8 could not be written: .*No space left on device[^\n]*$")
    with told, ends if last == 8 else contextlib.nullcontext():
        run_tiny(tmp_path)
    monkeypatch.undo()
    run_tiny(tmp_path)  # goes on from step 3, or is there
    assert metrics_file(tmp_path) == metrics_file(finished[0])
