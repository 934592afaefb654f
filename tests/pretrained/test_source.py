"""`init.source` of kind 'pretrained': a run starts from a published model, and is another run when the file is another."""

from pathlib import Path

import jax
import numpy as np
import pytest
from pretrained.test_convert import CONFIG, SHAPES, write

import moejax as mj
from moejax.core.errors import ConfigError
from moejax.train.same_run import files


def config(path: Path) -> dict:
    return {
        "model": mj.pretrained.config_of(str(path)),
        "init": {"source": {"kind": "pretrained", "path": str(path)}},
        "data": {"name": "embedded_text", "batch_size": 2, "seq_len": 8, "tokenizer": "bytes"},
        "task": {"kind": "next_token"},
        "optimizer": {"kind": "adamw", "learning_rate": 1e-3},
        "train": {"steps": 0},
        "eval": {"every": 0, "batches": 1, "split": "validation"},
        "checkpoint": {"every": 0, "keep": 1},
    }


@pytest.fixture
def folder(tmp_path: Path, rng: np.random.Generator) -> Path:
    sizes = {22: 256}
    shapes = {key: tuple(sizes.get(n, n) for n in shape) for key, shape in SHAPES.items()}
    tensors = {key: 0.1 * rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}
    return write(tmp_path / "model", tensors, {**CONFIG, "vocab_size": 256})


def test_a_run_starts_from_it(tmp_path: Path, folder: Path) -> None:
    mj.train.fit(config(folder), 0, tmp_path / "run")
    trained = mj.train.load(tmp_path / "run")
    given = mj.pretrained.load(str(folder)).variables["params"]
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, trained.params), given)


def test_another_model_is_refused_before_anything_is_read(tmp_path: Path, folder: Path) -> None:
    other = config(folder)
    other["model"] = {**other["model"], "num_layers": 2}
    with pytest.raises(ConfigError, match=r"init: the arrays are not those of the model"):
        mj.train.fit(other, 0, tmp_path / "run")


def test_its_contents_are_part_of_the_run(folder: Path) -> None:
    before = files(config(folder))
    assert set(before) == {"init.source"}
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(bytes(data))
    assert files(config(folder)) != before
