"""Baselines against the same written out with dictionaries, and against a separable problem."""

import collections
import itertools
import math

import numpy as np
import pytest

from experiments import baselines
from moejax import data

TEXT = {"tokens": [[0, 1, 0, 1, 2, 0], [1, 0, 1, 0, 2, 2]], "segments": [[1, 1, 1, 1, 2, 2], [1, 1, 1, 1, 1, 0]]}


def _rows(tokens: list[list[int]], segments: list[list[int]]) -> dict[str, np.ndarray]:
    tokens, segments = np.array(tokens), np.array(segments)
    targets = np.roll(tokens, -1, 1)
    valid = segments > 0
    valid[:, :-1] &= segments[:, :-1] == segments[:, 1:]
    valid[:, -1] = False
    return {"tokens": tokens, "segments": segments, "targets": targets, "valid": valid}


def _by_hand(train: dict, held: dict, vocabulary: int) -> list[float]:
    """Bits a target of each order: interpolated absolute discounting with dictionaries."""

    def events(rows: dict) -> list[tuple[int, int, int]]:
        found = []
        for i, t in itertools.product(*map(range, rows["tokens"].shape)):
            if rows["valid"][i, t]:
                inside = t > 0 and rows["segments"][i, t - 1] == rows["segments"][i, t]
                found.append((rows["tokens"][i, t - 1] if inside else "begin", rows["tokens"][i, t], rows["targets"][i, t]))
        return found

    def probability(event: tuple, order: int) -> float:
        if order == 0:
            return 1 / vocabulary
        counts = collections.Counter(e[-order:] for e in events(train))
        often = collections.Counter(counts.values())
        discount = often[1] / (often[1] + 2 * often[2]) if often[1] else 0
        history = {e: n for e, n in counts.items() if e[:-1] == event[-order:-1]}
        lower = probability(event, order - 1)
        if not history:
            return lower
        count, total = history.get(event[-order:], 0), sum(history.values())
        return (max(count - discount, 0) + discount * len(history) * lower) / total

    held_events = events(held)
    return [-sum(math.log2(probability(e, n)) for e in held_events) / len(held_events) for n in (1, 2, 3)]


@pytest.fixture
def corpus(monkeypatch: pytest.MonkeyPatch):
    """Replaces the data by rows of one's own: split -> batch."""

    def put(**splits: dict) -> None:
        monkeypatch.setattr(data, "make_iterator", lambda spec, split, seed, num_epochs: [splits[split]])

    return put


def test_ngrams_are_those_written_out_with_dictionaries(corpus) -> None:
    rng = np.random.default_rng(0)
    train = _rows(rng.integers(0, 4, (12, 9)).tolist(), np.sort(rng.integers(1, 3, (12, 9))).tolist())
    held = _rows(rng.integers(0, 4, (5, 9)).tolist(), np.sort(rng.integers(1, 3, (5, 9))).tolist())
    corpus(train=train, validation=held)
    found = baselines._ngrams({}, "validation")
    expected = _by_hand(train, held, 4)
    assert [score["eval/bits_per_byte"] for score in found.values()] == pytest.approx(expected)
    assert list(found) == ["unigram", "bigram", "trigram"]


def test_bits_are_of_bytes_where_tokens_have_several(corpus) -> None:
    rows = _rows(TEXT["tokens"], TEXT["segments"])
    corpus(train=rows, validation=rows)
    one = baselines._ngrams({}, "validation")["bigram"]["eval/bits_per_byte"]
    long = rows | {"bytes": np.full_like(rows["tokens"], 4)}
    corpus(train=long, validation=long)
    assert baselines._ngrams({}, "validation")["bigram"]["eval/bits_per_byte"] == pytest.approx(one / 4)


def test_logistic_regression_finds_a_line_and_no_xor(corpus) -> None:
    points = np.array(list(itertools.product((0.0, 1.0), repeat=2)) * 5)
    batch = {"image": points.reshape(-1, 1, 2, 1), "valid": np.ones(len(points), bool)}
    for label, accuracy in ((points[:, 0], 1.0), ((points.sum(1) == 1), 0.75)):
        rows = batch | {"label": label.astype(int)}
        corpus(train=rows, validation=rows)
        found = baselines._linear({}, "validation")["logistic regression"]["eval/accuracy"]
        assert found == accuracy if accuracy == 1 else found <= accuracy


def test_they_are_computed_once(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    from configs import small_lm

    calls = []
    monkeypatch.setattr(
        baselines, "_ngrams", lambda spec, split: calls.append(split) or {"unigram": {"eval/bits_per_byte": 1.0}}
    )
    assert baselines.baselines(small_lm.get_config(), tmp_path, known=True) == {}
    first = baselines.baselines(small_lm.get_config(), tmp_path)
    longer = small_lm.get_config()
    longer.train.steps *= 2
    assert baselines.baselines(longer, tmp_path, known=True) == first
    assert calls == ["validation"]
