"""Packing against a plain-Python account of what a row must hold."""

import numpy as np
import pytest
from data.oracle import expected_segments, segments_of
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.data.packing import Corpus, PackedRows, Window, cut, empty_row, pack


def corpus_of(documents, domains=None):
    return Corpus(
        tokens=np.array([t for document in documents for t in document], np.int32),
        offsets=np.cumsum([0] + [len(document) for document in documents]),
        domain=np.array(domains or [0] * len(documents), np.int32),
        ids=np.arange(len(documents)) + 7,
    )


def test_a_small_case_by_hand():
    rows = PackedRows(corpus_of([[1, 2, 3, 4, 5, 6], [8, 9]], domains=[0, 1]), np.arange(2), seq_len=4, packing=True)
    assert len(rows) == 2
    np.testing.assert_array_equal(rows[0]["tokens"], [1, 2, 3, 4])
    np.testing.assert_array_equal(rows[0]["targets"], [2, 3, 4, 5])
    np.testing.assert_array_equal(rows[0]["valid"], [True] * 4)
    np.testing.assert_array_equal(rows[0]["segments"], [1, 1, 1, 1])
    np.testing.assert_array_equal(rows[1]["tokens"], [5, 6, 8, 9])
    np.testing.assert_array_equal(rows[1]["targets"], [6, 0, 9, 0])
    np.testing.assert_array_equal(rows[1]["valid"], [True, False, True, False])
    np.testing.assert_array_equal(rows[1]["segments"], [1, 1, 2, 2])
    np.testing.assert_array_equal(rows[1]["positions"], [0, 1, 0, 1])
    np.testing.assert_array_equal(rows[1]["domain"], [0, 0, 1, 1])
    # Document 0 of the split is number 7 here; the second row starts with its window 1.
    assert divmod(int(rows[0]["example_id"]), 2**20) == (7, 0)
    assert divmod(int(rows[1]["example_id"]), 2**20) == (7, 1)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    seq_len=st.integers(2, 17),
    packing=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_every_token_appears_once_with_its_target(lengths, seq_len, packing, seed):
    rng = np.random.default_rng(seed)
    documents = [rng.integers(1, 50, length).tolist() for length in lengths]
    domains = rng.integers(0, 3, len(documents)).tolist()
    packed = PackedRows(corpus_of(documents, domains), np.arange(len(documents)), seq_len, packing)
    rows = [packed[i] for i in range(len(packed))]
    assert segments_of(rows) == expected_segments(documents, domains, seq_len)
    assert len({int(row["example_id"]) for row in rows}) == len(rows)
    used = [int((row["segments"] > 0).sum()) for row in rows]
    if packing:
        assert all(a + b > seq_len for i, a in enumerate(used) for b in used[:i]), "two rows would fit into one"
    else:
        assert all(row["segments"].max() == 1 for row in rows)


def test_windows_are_consecutive_and_cover_the_document():
    windows = cut(np.array([3, 10, 0]), np.arange(3), seq_len=4)
    assert windows == [Window(0, 0, 3), Window(1, 0, 4), Window(1, 4, 4), Window(1, 8, 2)]


def test_best_fit_prefers_the_fullest_row_with_room():
    lengths = [7, 5, 3, 2]
    rows = pack([Window(i, 0, length) for i, length in enumerate(lengths)], seq_len=10, packing=True)
    assert [[w.length for w in row] for row in rows] == [[7, 3], [5, 2]]


@pytest.mark.parametrize("packing", [True, False])
def test_no_documents_give_no_rows(packing):
    assert len(PackedRows(corpus_of([[]]), np.arange(1), 4, packing)) == 0


def test_the_empty_row_counts_nowhere():
    row = empty_row(5)
    assert row["example_id"] == -1
    assert not any(row[key].any() for key in row if key != "example_id")
