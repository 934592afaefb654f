"""Runs on a mesh, and checkpoints that leave it: saved on eight devices, read on any number, with every expert in its place."""

import sys
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

sys.path.insert(0, str(Path(__file__).parent))
import worker

from moejax.core.errors import ConfigError
from moejax.core.files import Damaged
from moejax.parallel import MESH_AXES, Parallel, make_mesh, parse_mesh
from moejax.parallel.batches import data_shard, to_global
from moejax.train import load, program
from moejax.train.checkpoints import Checkpoints
from moejax.train.settings import TrainSettings

BATCH = {name: value for name, value in next(worker.Rows({"batch_size": 8}, "train")).items() if name != "example_id"}


def make_program(mesh, devices=None):
    parallel = None if mesh is None else Parallel(make_mesh(mesh, devices))
    config = worker.config().to_dict()
    return program.get_program(config, TrainSettings(steps=3), BATCH, {}, parallel=parallel)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A state with every number its own, saved by eight devices; on the host, and the folder."""
    made = make_program("fsdp=2,expert=2,tensor=2")
    count = iter(range(10**6))

    def filled(like):
        if jax.dtypes.issubdtype(like.dtype, jax.dtypes.prng_key):
            return jax.device_put(jax.random.key(3), like.sharding)
        values = (next(count) + np.arange(max(np.prod(like.shape), 1)) / 4096).reshape(like.shape).astype(like.dtype)
        return jax.device_put(values, like.sharding)

    state = jax.tree.map(filled, made.state)
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state))
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    checkpoints = Checkpoints(folder, keep=2, asynchronous=True)
    checkpoints.save(2, state, {"done": 2}, {"config": worker.config().to_dict(), "seed": 0})
    checkpoints.close()
    return jax.device_get(_plain(state)), folder


def _plain(state):
    return state.replace(key=jax.random.key_data(state.key))


@pytest.mark.parametrize(
    ("mesh", "devices"), [(None, 1), ("expert=4", 4), ("data=2,tensor=2", 4), ("fsdp", 8)], ids=lambda x: str(x)
)
def test_a_state_of_eight_devices_is_read_bit_by_bit_on_others(saved, mesh, devices):
    expected, folder = saved
    made = make_program(mesh, jax.devices()[:devices])
    checkpoints = Checkpoints(folder, keep=2, asynchronous=False)
    restored = checkpoints.restore(checkpoints.newest, made.state)
    checkpoints.close()
    assert restored.data_state == {"done": 2}
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(_plain(restored.state)), expected)
    if mesh is not None:
        same = jax.tree.map(lambda x, like: x.sharding.is_equivalent_to(like.sharding, x.ndim), restored.state, made.state)
        assert all(jax.tree.leaves(same))
    bank = restored.state.params["stack"]["repeats"]["0_moe"]["ffn"]["bank"]["w_gate"]
    assert len(bank.sharding.device_set) == devices


def test_a_sharded_checkpoint_is_read_without_its_model(saved):
    expected, folder = saved
    _, variables, meta = load(folder.parent)
    jax.tree.map(np.testing.assert_array_equal, variables["params"], expected.params)
    assert meta["step"] == 2


def crashing(at):
    class Crashing(worker.Rows):
        def __next__(self):
            if self.seed[1] and self.done == at:
                raise ZeroDivisionError
            return super().__next__()

    return Crashing


@pytest.mark.slow
def test_a_run_wanders_over_meshes_past_a_damaged_checkpoint_and_its_losses_stay(tmp_path):
    whole = worker.run(tmp_path / "whole", train__steps=8, checkpoint__every=2)
    wandering = {"train__steps": 8, "checkpoint__every": 2}
    run = tmp_path / "run"
    with pytest.raises(ZeroDivisionError):
        worker.run(run, crashing(7), mesh="fsdp x ep", **wandering)
    victim = max((f for f in (run / "checkpoints/6").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.warns(Damaged, match="6 is damaged"):
        end = worker.run(run, mesh="data=4,tensor=2", **wandering)
    for line, expected in zip(end.history, whole.history, strict=True):
        np.testing.assert_allclose(line["train/loss"], expected["train/loss"], rtol=1e-5)
    np.testing.assert_allclose(end.metrics["eval/loss"], whole.metrics["eval/loss"], rtol=1e-5)
    assert end.flops_per_step == pytest.approx(whole.flops_per_step, rel=0.3)
    # What has finished is read on any mesh, without data.
    again = worker.run(run, None, mesh="dp", **wandering)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(again.variables), jax.device_get(end.variables))


def test_wrong_meshes_are_named_before_anything_is_compiled(tmp_path):
    with pytest.raises(ConfigError, match="mesh='ed': unknown axis or preset 'ed'"):
        worker.run(tmp_path, mesh="ed")
    with pytest.raises(ConfigError, match=r"expert=8 shards of mesh='expert=8'"):
        worker.run(tmp_path, mesh="ep")
    with pytest.raises(ConfigError, match=r"data.batch_size=4 does not divide among the 8 parts"):
        worker.run(tmp_path, mesh="dp", data__batch_size=4)
    with pytest.raises(ConfigError, match="unknown key 'kinds' in exchange; did you mean 'kind'"):
        worker.run(tmp_path, exchange={"kinds": "ring"})


class Device:
    """What matters of a device here: the process it belongs to, two of them to each."""

    def __init__(self, i):
        self.id, self.process_index, self.platform, self.device_kind = i, i // 2, "cpu", "cpu"


def shards(spec, processes):
    """What each of some processes would read."""
    devices = np.array([Device(i) for i in range(2 * processes)], object)
    mesh = Mesh(devices.reshape(tuple(parse_mesh(spec, devices.size).values())), MESH_AXES)
    found = []
    for process in range(processes):
        with mock.patch("jax.process_index", return_value=process), mock.patch("jax.local_device_count", return_value=2):
            found.append(data_shard(mesh))
    return found


def test_each_process_reads_the_rows_of_its_devices():
    assert shards("data=2,expert=2", 2) == [(0, 2), (1, 2)]
    assert shards("data=2,expert=4", 4) == [(0, 4), (1, 4), (2, 4), (3, 4)]
    # A layer that spans two processes: both read the same rows.
    assert shards("data=2,tensor=4", 4) == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert shards("tensor=4", 2) == [(0, 1), (0, 1)]
    with pytest.raises(ConfigError, match="need rows of a batch that others need in part"):
        shards("data=2,tensor=3", 3)


def test_the_batch_lies_in_the_order_of_its_rows():
    made = make_program("data=2,tensor=4")
    batch = to_global(BATCH, made.batch)
    assert batch["tokens"].sharding == NamedSharding(made.parallel.mesh, PartitionSpec(("data", "fsdp", "expert")))
    np.testing.assert_array_equal(batch["tokens"], BATCH["tokens"])
    np.testing.assert_array_equal(batch["tokens"].addressable_shards[-1].data, BATCH["tokens"][4:])
