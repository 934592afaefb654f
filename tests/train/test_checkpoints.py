"""Checkpoints: exact round trips, and damage that is noticed."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.errors import ConfigError
from moejax.core.files import Damaged, digest
from moejax.optim.base import optimizers
from moejax.train.checkpoints import Checkpoints, find_damage, load, load_meta
from moejax.train.step import TrainState

OPTIMIZER = optimizers.build({"kind": "adamw", "learning_rate": 0.1}, "optimizer", steps=10)


def state_at(step, width=4):
    params = {"dense": {"kernel": jnp.full((3, width), step / 7), "bias": jnp.arange(float(width))}}
    return TrainState(
        step=jnp.int32(step),
        params=params,
        opt_state=jax.tree.map(lambda x: x + step, OPTIMIZER.transform().init(params)),
        collections={"router_state": {"bias": jnp.full((2,), 0.1 * step)}},
        key=jax.random.key(step),
        first_bad_step=jnp.int32(-1),
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with checkpoints 1, 2 and 3; copied by the tests that damage it."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    checkpoints = Checkpoints(directory, keep=3, asynchronous=True)
    for step in (1, 2, 3):
        data_state = f"state {step}".encode() if step == 2 else {"nested": {"done": np.int64(step)}, "order": [2, 1]}
        checkpoints.save(step, state_at(step), data_state, {"config": {"model": {"width": 4}}, "seed": 7})
    checkpoints.close()
    return directory


@pytest.fixture
def damaged(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


def as_arrays(tree):
    return jax.tree.map(lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x, tree)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, as_arrays(a), as_arrays(b))


def test_round_trip_is_exact_for_state_iterator_and_meta(saved):
    checkpoints = Checkpoints(saved, keep=3, asynchronous=True)
    assert checkpoints.newest == 3
    expected_data = {2: b"state 2", 3: {"nested": {"done": 3}, "order": [2, 1]}}
    for step, data_state in expected_data.items():
        restored = checkpoints.restore(step, jax.eval_shape(lambda: state_at(0)))
        assert_same(restored.state, state_at(step))
        assert type(restored.state.opt_state) is type(state_at(0).opt_state)
        assert restored.data_state == data_state
        assert restored.meta["seed"] == 7
        assert restored.meta["step"] == step
    checkpoints.close()


def test_load_gives_config_and_variables_without_a_model(saved):
    config, variables, meta = load(saved.parent)
    assert config == {"model": {"width": 4}}
    assert_same(variables, {"params": state_at(3).params, "router_state": state_at(3).collections["router_state"]})
    assert load(saved.parent, 1)[2]["step"] == 1
    assert meta["step"] == 3
    with pytest.raises(FileNotFoundError, match=r"no checkpoint 9 .* there are \[1, 2, 3\]"):
        load(saved.parent, 9)


def test_a_save_is_not_disturbed_by_donation_of_the_saved_state(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1, asynchronous=True)
    step = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    state = state_at(5)
    big = {"x": jnp.arange(1e6)}
    state = state.replace(params=big, opt_state=())
    checkpoints.save(5, state, {}, {"config": {}, "seed": 0})
    params = state.params
    for _ in range(3):
        params = step(params)
    restored = checkpoints.restore(5, state.replace(params={"x": jnp.zeros(1_000_000)}))
    checkpoints.close()
    np.testing.assert_array_equal(restored.state.params["x"], np.arange(1e6, dtype=np.float32))


def test_only_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2, asynchronous=False)
    for step in (1, 5, 9):
        checkpoints.save(step, state_at(step), {}, {"config": {}, "seed": 0})
    checkpoints.close()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["5", "9"]


def test_any_flipped_byte_truncation_or_missing_file_is_damage(saved, tmp_path):
    """Every file that a restore reads, one after the other."""
    path = saved / "3"
    assert find_damage(path) is None
    files = [f.relative_to(path) for f in path.rglob("*") if f.is_file() and (f.parent != path or f.suffix == ".json")]
    assert len(files) > 15
    for file in files:
        whole = (path / file).read_bytes()
        for change in ("flip", "truncate", "remove"):
            copy = shutil.copytree(path, tmp_path / "copy", dirs_exist_ok=True)
            if change == "flip":
                place = len(whole) // 2
                (copy / file).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            elif change == "truncate":
                (copy / file).write_bytes(whole[:-1])
            else:
                (copy / file).unlink()
            # A flipped letter of a file's name in the list of checksums makes it a missing file; every other is a bad sum.
            assert find_damage(copy) is not None, (file, change)


def test_a_damaged_newest_checkpoint_is_moved_aside_and_the_one_before_is_used(damaged):
    victim = max((f for f in (damaged / "3" / "variables").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-3])
    kept = {f.relative_to(damaged / "3") for f in (damaged / "3").rglob("*")}
    with pytest.raises(ValueError, match="is damaged"):
        load(damaged.parent)
    with pytest.warns(Damaged, match=rf"checkpoint {damaged}/3 is damaged \(variables/.* moved to .*/3\.corrupt"):
        checkpoints = Checkpoints(damaged, keep=3, asynchronous=True)
    assert checkpoints.newest == 2
    assert_same(checkpoints.restore(2, state_at(0)).state, state_at(2))
    assert {f.relative_to(damaged / "3.corrupt") for f in (damaged / "3.corrupt").rglob("*")} == kept
    # The same step can be saved again, damaged again, and nothing is overwritten.
    checkpoints.save(3, state_at(3), {}, {"config": {}, "seed": 0})
    checkpoints.close()
    (damaged / "3" / "meta" / "metadata").unlink()
    with pytest.warns(Damaged, match=r"3\.corrupt-2"):
        assert Checkpoints(damaged, keep=3, asynchronous=True).newest == 2
    assert (damaged / "3.corrupt").exists()


def test_when_all_are_damaged_there_is_none(damaged):
    for step in "123":
        (damaged / step / "checksums.json").unlink()
    with pytest.warns(Damaged) as warnings:
        assert Checkpoints(damaged, keep=3, asynchronous=True).newest is None
    assert len(warnings) == 3


def test_what_a_cut_off_save_left_is_not_a_checkpoint(damaged):
    (damaged / "3").rename(damaged / "3.orbax-checkpoint-tmp")
    checkpoints = Checkpoints(damaged, keep=3, asynchronous=True)
    assert checkpoints.newest == 2
    checkpoints.save(3, state_at(3), {}, {"config": {}, "seed": 0})
    checkpoints.close()
    assert find_damage(damaged / "3") is None


def test_another_config_is_refused_by_its_first_differing_parameter(saved):
    checkpoints = Checkpoints(saved, keep=3, asynchronous=True)
    with pytest.raises(ConfigError, match=r"params/dense/bias is float32\[4\] there and float32\[6\] here"):
        checkpoints.restore(3, jax.eval_shape(lambda: state_at(0, width=6)))
    fewer = state_at(0).replace(collections={})
    with pytest.raises(ConfigError, match=r"collections/router_state/bias is float32\[2\] there and absent here"):
        checkpoints.restore(3, fewer)
    checkpoints.close()


def test_a_renamed_checkpoint_is_not_trusted(damaged):
    shutil.copytree(damaged / "3", damaged / "9")
    with pytest.raises(ValueError, match="9 is damaged: it is the checkpoint of step 3"):
        load(damaged.parent, 9)
    with pytest.raises(ValueError, match="9 is damaged: it is the checkpoint of step 3"):
        load_meta(damaged.parent)
    with pytest.warns(Damaged, match=r"checkpoint \S+/9 is damaged \(it is the checkpoint of step 3\)"):
        checkpoints = Checkpoints(damaged, keep=3, asynchronous=True)
    assert checkpoints.newest == 3
    checkpoints.close()


def test_what_only_looks_like_a_step_is_left_alone(damaged):
    """Names in other digits, a leading zero, a link to nowhere, a link in a circle, a file."""
    for name in ("²", "٤", "010", "-5"):
        shutil.copytree(damaged / "3", damaged / name)
    (damaged / "11").symlink_to(damaged / "nowhere")
    (damaged / "12").symlink_to(damaged / "12")
    (damaged / "13").write_text("")
    assert load(damaged.parent).meta["step"] == 3
    checkpoints = Checkpoints(damaged, keep=2, asynchronous=False)
    assert checkpoints.newest == 3
    checkpoints.save(4, state_at(4), {}, {"config": {}, "seed": 0})
    assert checkpoints.restore(4, state_at(0)).meta["step"] == 4
    checkpoints.close()
    assert {"²", "٤", "010", "-5"} <= {path.name for path in damaged.iterdir()}


def test_a_link_to_a_checkpoint_is_one_under_its_own_name_only(damaged, tmp_path):
    (damaged / "3").rename(tmp_path / "3")
    (damaged / "3").symlink_to(tmp_path / "3")
    (damaged / "8").symlink_to(tmp_path / "3")
    with pytest.warns(Damaged, match=r"8 is damaged"):
        checkpoints = Checkpoints(damaged, keep=1, asynchronous=False)
    assert checkpoints.newest == 3
    checkpoints.save(4, state_at(4), {}, {"config": {}, "seed": 0})
    checkpoints.close()
    assert find_damage(damaged / "4") is None
    assert find_damage(tmp_path / "3") is None
    assert not (damaged / "3").exists()


@pytest.mark.parametrize("key", ["shapes", "step", "config", "seed"])
def test_meta_that_says_too_little_is_damage(damaged, key):
    file = damaged / "3" / "meta" / "metadata"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != key}))
    manifest = json.loads((damaged / "3" / "checksums.json").read_text())
    (damaged / "3" / "checksums.json").write_text(json.dumps(manifest | {"meta/metadata": digest(file)}))
    with pytest.warns(Damaged, match=f"3 is damaged .meta does not say {key}"):
        assert Checkpoints(damaged, keep=3, asynchronous=True).newest == 2


@pytest.mark.filterwarnings("ignore:Sharding info not provided:UserWarning")
def test_orbax_next_interface_reads_what_is_written(saved):
    """Its first interface goes with version 1.0, and checkpoints outlive it."""
    from orbax.checkpoint.experimental import v1

    found = v1.load_checkpointables(saved / "3", {"variables": None, "meta": None})
    expected = {"params": state_at(3).params, **state_at(3).collections}
    jax.tree.map(np.testing.assert_array_equal, dict(found["variables"]), expected)
    assert (found["meta"]["step"], found["meta"]["seed"]) == (3, 7)
