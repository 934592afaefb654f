"""Text batches: whole epochs against the documents themselves, orders, shards, resumption, mixtures."""

import json
import re
import sys
import types
from collections import Counter
from pathlib import Path

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest
from data.oracle import expected_segments, segments_of
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.core.errors import ConfigError
from moejax.data import check_covers, info, make_iterator, tokenizers
from moejax.data.builders import sources

BASE = {"name": "embedded_text", "batch_size": 8, "seq_len": 64}
MODES = pytest.mark.parametrize("streaming", [False, True], ids=["in_memory", "streamed"])


def rows_of(batches):
    return [{key: value[i] for key, value in batch.items()} for batch in batches for i in range(len(batch["valid"]))]


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


@MODES
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "alone"])
def test_an_epoch_holds_every_byte_of_every_document_once(streaming, packing):
    config = {**BASE, "seq_len": 256, "streaming": streaming, "packing": packing}
    rows = rows_of(make_iterator(config, "test"))
    documents = sources.text_splits()["test"]
    domains = info(config).domains
    expected = expected_segments([list(d.text) for d in documents], [domains.index(d.domain) for d in documents], 256)
    assert segments_of(rows) == expected
    padding = [row for row in rows if row["example_id"] == -1]
    assert len(padding) < config["batch_size"]
    ids = [int(row["example_id"]) for row in rows if row["example_id"] != -1]
    assert len(set(ids)) == len(ids)


def test_batches_have_the_promised_types_and_shapes():
    batch = next(make_iterator(BASE))
    for key in ("tokens", "targets", "segments", "positions", "domain"):
        assert batch[key].dtype == np.int32
        assert batch[key].shape == (8, 64)
    assert batch["valid"].dtype == bool
    assert batch["example_id"].dtype == np.int64
    assert batch["example_id"].shape == (8,)


def test_little_of_a_row_is_padding():
    rows = rows_of(make_iterator({**BASE, "seq_len": 512}, "train", num_epochs=1))
    assert np.mean([row["segments"] == 0 for row in rows]) < 0.02


def test_splits_share_no_document_and_hold_every_domain():
    splits = sources.text_splits()
    texts = {split: {d.text for d in documents} for split, documents in splits.items()}
    assert sum(map(len, texts.values())) == len(set.union(*texts.values()))
    for documents in splits.values():
        assert {d.domain for d in documents} == set(sources.TEXT_DOMAINS)
    assert info(BASE).sizes == {split: len(documents) for split, documents in splits.items()}
    for domain in sources.TEXT_DOMAINS:
        held = sum(len(d.text) for d in splits["test"] + splits["validation"] if d.domain == domain)
        total = sum(len(d.text) for documents in splits.values() for d in documents if d.domain == domain)
        assert 0.1 <= held / total < 0.3


def test_chosen_domains_are_counted_in_the_order_of_the_configuration():
    config = {**BASE, "domains": ("literature", "reference")}
    assert info(config).domains == ("literature", "reference")
    texts = {d.text for d in sources.text_splits()["test"] if d.domain == "literature"}
    for row in rows_of(make_iterator(config, "test")):
        for segment in range(1, int(row["segments"].max()) + 1):
            text = row["tokens"][row["segments"] == segment].astype(np.uint8).tobytes()
            is_literature = int(row["domain"][row["segments"] == segment][0]) == 0
            assert any(text in whole for whole in texts) or not is_literature


@MODES
def test_the_seed_decides_the_order(streaming):
    config = {**BASE, "streaming": streaming}
    first, again, other = (take(make_iterator(config, seed=seed), 5) for seed in (3, 3, 4))
    assert_same(first, again)
    assert any((a["tokens"] != b["tokens"]).any() for a, b in zip(first, other, strict=True))


@MODES
def test_epochs_differ_in_order_and_agree_in_content(streaming):
    config = {**BASE, "seq_len": 256, "domains": ("reference",), "streaming": streaming}
    twice = rows_of(make_iterator(config, num_epochs=2))
    once = segments_of(rows_of(make_iterator(config, num_epochs=1)))
    assert segments_of(twice) == once + once
    ids = [int(row["example_id"]) for row in twice]
    half = len(ids) // 2
    assert ids[:half] != ids[half : 2 * half]


def test_the_second_epoch_of_one_seed_is_not_the_first_of_the_next():
    config = {**BASE, "seq_len": 512, "domains": ("reference",)}
    ids = [row["example_id"] for row in rows_of(make_iterator(config, num_epochs=2, seed=0)) if row["example_id"] >= 0]
    following = [row["example_id"] for row in rows_of(make_iterator(config, num_epochs=1, seed=1)) if row["example_id"] >= 0]
    assert ids[len(ids) // 2 :] != following


def test_training_order_mixes_documents_and_domains():
    batch = next(make_iterator({**BASE, "batch_size": 64, "seq_len": 256}))
    assert len(set((batch["example_id"] // 2**20).tolist())) > 32
    assert set(batch["domain"].ravel().tolist()) == {0, 1, 2}


@MODES
def test_evaluation_has_one_order_whatever_the_seed(streaming):
    config = {**BASE, "streaming": streaming}
    assert_same(list(make_iterator(config, "validation", seed=0)), list(make_iterator(config, "validation", seed=9)))
    # Without shuffling, training goes through the documents in one fixed order too.
    still = {**config, "shuffle": False, "domains": ("reference",)}
    assert_same(take(make_iterator(still, seed=0), 4), take(make_iterator(still, seed=1), 4))


def test_the_first_batches_of_an_evaluation_sample_every_domain():
    seen = {int(d) for batch in take(make_iterator({**BASE, "batch_size": 32}, "validation"), 2) for d in batch["domain"][:, 0]}
    assert seen == {0, 1, 2}


@pytest.mark.parametrize("shards", [2, 4])
def test_shards_together_are_the_batch_of_one_host(shards):
    whole = take(make_iterator(BASE, seed=1), 30)
    parts = [take(make_iterator(BASE, seed=1, shard_index=i, shard_count=shards), 30) for i in range(shards)]
    for step, batch in enumerate(whole):
        for i in range(shards):
            assert parts[i][step]["tokens"].shape == (8 // shards, 64)
            for key in batch:
                np.testing.assert_array_equal(parts[i][step][key], np.split(batch[key], shards)[i])


@MODES
def test_shards_of_a_finite_pass_are_disjoint_complete_and_equally_long(streaming):
    config = {**BASE, "seq_len": 256, "streaming": streaming}
    parts = [list(make_iterator(config, "test", shard_index=i, shard_count=4)) for i in range(4)]
    assert len({len(part) for part in parts}) == 1
    ids = [{int(row["example_id"]) for row in rows_of(part)} - {-1} for part in parts]
    assert sum(map(len, ids)) == len(set.union(*ids))
    single = rows_of(make_iterator(config, "test"))
    assert segments_of([row for part in parts for row in rows_of(part)]) == segments_of(single)


def test_streamed_training_shards_read_different_documents():
    config = {**BASE, "streaming": True, "batch_size": 16}
    # Few enough batches that no shard comes to its second epoch.
    parts = [take(make_iterator(config, shard_index=i, shard_count=2), 200) for i in range(2)]
    documents = [{int(row["example_id"]) // 2**20 for row in rows_of(part)} for part in parts]
    assert documents[0]
    assert not documents[0] & documents[1]


@MODES
@settings(max_examples=5, deadline=None)
@given(before=st.integers(0, 25), after=st.integers(1, 4), seed=st.integers(0, 3))
def test_resuming_goes_on_bit_exactly(streaming, before, after, seed):
    config = {**BASE, "streaming": streaming, "domains": ("reference",), "batch_size": 64}  # an epoch is about 95 batches
    iterator = make_iterator(config, seed=seed)
    take(iterator, before)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, after)
    fresh = make_iterator(config, seed=seed)
    fresh.set_state(state)
    assert_same(take(fresh, after), expected)
    # Going back within one iterator works too.
    iterator.set_state(state)
    assert_same(take(iterator, after), expected)


@MODES
def test_resuming_across_the_end_of_an_epoch(streaming):
    config = {**BASE, "streaming": streaming, "domains": ("reference",), "batch_size": 64}
    iterator = make_iterator(config)
    take(iterator, 140)
    state = iterator.get_state()
    fresh = make_iterator(config)
    fresh.set_state(state)
    assert_same(take(fresh, 5), take(iterator, 5))


@MODES
def test_orbax_stores_and_restores_an_iterator(streaming, tmp_path):
    config = {**BASE, "streaming": streaming}
    iterator = make_iterator(config)
    take(iterator, 7)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(7, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
        manager.wait_until_finished()
        fresh = make_iterator(config)
        manager.restore(7, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(fresh)))
    assert_same(take(fresh, 4), take(iterator, 4))


def test_a_mixture_gives_each_domain_its_share_of_rows():
    weights = {"code": 0.2, "reference": 0.5, "literature": 0.3}
    batches = take(make_iterator({**BASE, "batch_size": 20, "mixture": weights}), 50)
    rows = Counter(int(row["domain"][0]) for row in rows_of(batches))
    for i, weight in enumerate(weights.values()):
        assert rows[i] / 1000 == pytest.approx(weight, abs=0.01)
    # A finite pass is every document once, mixture or not.
    assert_same(list(make_iterator({**BASE, "mixture": weights}, "test")), list(make_iterator(BASE, "test")))


@pytest.mark.slow
def test_worker_processes_give_the_same_batches():
    # Grain deals batches to worker processes and takes them back in turn, so the order is kept.
    plain = take(make_iterator(BASE), 4)
    iterator = make_iterator({**BASE, "workers": 2})
    assert_same(take(iterator, 4), plain)
    iterator.close()


class Fast:
    """A stand-in for the `tokenizers` package: a word's id is its length, and the file asks for documents of three tokens."""

    def __init__(self):
        self.cut = self.padded = True

    @staticmethod
    def from_file(path):
        assert Path(path).read_text() == "{}"
        return Fast()

    def no_truncation(self):
        self.cut = False

    def no_padding(self):
        self.padded = False

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        assert not self.padded
        words = list(re.finditer(r"\S+", text))[: 3 if self.cut else None]
        return types.SimpleNamespace(ids=[min(len(word[0]), 31) for word in words], offsets=[word.span() for word in words])

    def get_vocab(self):
        return {f"<{i}>": i for i in range(32) if i != 7}


@pytest.fixture
def words(monkeypatch, tmp_path):
    """A config of a tokenizer file."""
    monkeypatch.setitem(sys.modules, "tokenizers", types.SimpleNamespace(Tokenizer=Fast))
    path = tmp_path / "words.json"
    path.write_text("{}")
    return {**BASE, "tokenizer": str(path), "domains": ("literature",)}


@MODES
def test_a_tokenizer_file_is_used_on_whole_documents(words, streaming):
    assert info(words).vocab_size == 32
    texts = [d.text.decode() for d in sources.text_splits()["test"] if d.domain == "literature"]
    documents = [[min(len(w), 31) for w in text.split()] for text in texts]
    rows = rows_of(make_iterator({**words, "streaming": streaming}, "test"))
    assert segments_of(rows) == expected_segments(documents, [0] * len(documents), 64)
    # Every byte lies behind one token, and of these the first of a document is no target.
    behind = sum(len(text.encode()) - len(re.match(r"\s*\S+", text)[0].encode()) for text in texts)
    assert sum(int(row["bytes"].sum()) for row in rows) == behind
    assert not any(row["bytes"][~row["valid"]].any() for row in rows)
    one = next(row for row in rows if row["valid"].all())
    assert (one["bytes"] > one["targets"]).all()  # a word and the blank before it


def test_bytes_behind_tokens_are_those_of_utf8():
    text = " aé\u20ac\U0001f600 b \n"
    # 'aé', '€', and the smiley as two tokens of its four bytes; 'b' has the blanks around it.
    np.testing.assert_array_equal(tokenizers._sizes(text, [3, 4, 5, 5, 7]), [4, 3, 4, 0, 4])
    assert sum([4, 3, 4, 0, 4]) == len(text.encode())
    assert tokenizers._sizes(" ", []).shape == (0,)


def test_a_vocabulary_larger_than_the_embedding_is_noticed_before_training(words):
    with pytest.raises(ConfigError, match=r"model.vocab_size=16 is less than the 32 tokens of data.tokenizer='.*words.json'"):
        check_covers({"vocab_size": 16}, info(words), words["tokenizer"])
    check_covers({"vocab_size": 32}, info(words))
    digits = info({"name": "embedded_digits", "batch_size": 1})
    with pytest.raises(ConfigError, match=r"model.num_classes=9 is less than the 10 classes"):
        check_covers({"num_classes": 9}, digits)


def test_a_tokenizer_file_needs_the_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    path = tmp_path / "words.json"
    path.write_text("{}")
    with pytest.raises(ConfigError, match=r"data\.tokenizer=.*pip install tokenizers"):
        make_iterator({**BASE, "tokenizer": str(path)})
    with pytest.raises(ConfigError, match=r"data\.tokenizer='byte'.*did you mean 'bytes'"):
        make_iterator({**BASE, "tokenizer": "byte"})
