"""Batches that cannot be are refused before anything of them is made."""

import pytest

from moejax.core import machine
from moejax.core.errors import ConfigError
from moejax.data import make_iterator, order

TEXT = {"name": "embedded_text", "batch_size": 4, "seq_len": 32, "domains": ("literature",)}
DIGITS = {"name": "embedded_digits", "batch_size": 4}
HUGE = 2**24  # as much as a config may ask for


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize(
    "config",
    [TEXT | {"batch_size": HUGE}, TEXT | {"seq_len": HUGE}, TEXT | {"prefetch": HUGE}, DIGITS | {"batch_size": HUGE}]
    + [TEXT | {"batch_size": HUGE, "streaming": True}, DIGITS | {"image_size": 10**8}],
    ids=str,
)
def test_more_memory_than_there_is(config, split, monkeypatch):
    monkeypatch.setattr(order, "memory", lambda: 10**9)
    with pytest.raises(ConfigError, match=r"data\.batch_size=\d+ is [\d.,]+ [kMG]B a batch .* this machine has [\d.,]+ GB"):
        make_iterator(config, split)


@pytest.mark.parametrize("config", [TEXT, TEXT | {"streaming": True}, DIGITS], ids=["packed", "streamed", "images"])
def test_more_rows_than_the_data_have(config):
    with pytest.raises(ConfigError, match=r"data\.batch_size=100000 is more than the \d+ rows of split 'train'"):
        make_iterator(config | {"batch_size": 100_000})
    # One pass is filled up: a validation split may be smaller than a batch.
    assert len(next(make_iterator(DIGITS | {"batch_size": 500}, "validation"))["label"]) == 500


def test_the_whole_split_is_a_batch():
    assert len(set(next(make_iterator(DIGITS | {"batch_size": 1437}))["example_id"].tolist())) == 1437
    with pytest.raises(ConfigError, match="1437 rows"):
        make_iterator(DIGITS | {"batch_size": 1438})


def test_memory_is_that_of_the_container_where_it_has_less(tmp_path, monkeypatch):
    whole = machine.memory()
    assert 2**28 < whole < 2**50
    (tmp_path / "max").write_text("max\n")
    (tmp_path / "limit").write_text(f"{2**20}\n")
    monkeypatch.setattr(machine, "_LIMITS", (tmp_path / "max", tmp_path / "limit", tmp_path / "none"))
    assert machine.memory() == 2**20
    monkeypatch.setattr(order, "memory", machine.memory)
    with pytest.raises(ConfigError, match=r"this machine has 1\.05 MB"):
        make_iterator(TEXT | {"batch_size": 400})
