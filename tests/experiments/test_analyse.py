"""Analysing a finished run: table, pictures and JSON, from its checkpoints."""

import json
from pathlib import Path

import pytest

from configs import small_lm
from experiments import analyse
from experiments.cache import Run
from moejax.core.errors import ConfigError
from moejax.train import fit


@pytest.mark.slow
def test_a_run_is_seen_from_its_checkpoints(tmp_path: Path) -> None:
    config = small_lm.get_config()
    config.model.d_model, config.model.num_layers = 16, 2
    config.data.batch_size = 4
    config.train = {"steps": 4, "accumulation": 1, "log_every": 2}
    config.eval.batches = 1
    config.optimizer.warmup_steps = 1
    config.checkpoint = {"every": 2, "keep": 2, "asynchronous": False}
    fit(config, seed=0, workdir=tmp_path / "run")
    seen = analyse.look(Run("moe", 0, {}, path=tmp_path / "run"), batches=2)
    (name,) = seen.layers
    assert name == "stack.repeats.1_moe.ffn.0"
    assert seen.labels == ("code", "reference", "literature")
    assert seen.layers[name].counts.sum() == pytest.approx(2 * seen.layers[name].tokens.sum())
    ((step, share),) = seen.changes[name]
    assert step == 4
    assert 0 < share < 1
    assert 0 < seen.noise[name] < 1
    found = {"moe": seen, "again": seen}
    for picture in (analyse.experts, analyse.similarity, analyse.changes):
        path = picture(found, tmp_path / f"{picture.__name__}.png")
        assert path.stat().st_size > 10_000
    row = analyse.table(found).rows[0]
    assert row[:2] == ("moe", "moe ffn 0")
    assert row[3] == "2"
    written = json.loads(json.dumps(analyse.to_json(seen)))
    assert len(written["layers"][name]["favourite_tokens"]) == 8


def test_a_run_without_checkpoints_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no checkpoint; train it again with --fresh"):
        analyse.look(Run("moe", 0, {}, path=tmp_path))
