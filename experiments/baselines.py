"""What is reached without a network, on the same data: smoothed n-grams for text, logistic regression for images.

    found = baselines(config, cache)      # {'unigram': {'eval/bits_per_byte': 4.63}, 'bigram': ..., 'trigram': ...}

A model that has not passed them has learnt little, and a comparison of such models says little. They read the batches that a run of
the config reads: the same splits, rows and documents. What stands before a token in its row and document is its history.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from moejax.core.files import write_json

ORDERS = ("unigram", "bigram", "trigram")
LINEAR = "logistic regression"
VERSION = 1  # of how baselines are computed: what was stored before another one is computed anew
ENOUGH = 20_000_000  # tokens or images that are read, of data that have more

Scores = dict[str, dict[str, float]]  # baseline -> metric -> value


def baselines(config: ConfigDict, runs: Path, known: bool = False) -> Scores:
    """The baselines of the data that `config` is trained on and evaluated with, in this order; none for other data.

    Args:
      config: of a run whose data have been read before.
      runs: the folder of runs, in which they are kept from one command to the next.
      known: only what is kept there; nothing is read or computed.
    """
    from moejax.train.settings import normalized, plain

    config = plain(normalized(config))
    split = config["eval"]["split"]
    what = {"data": config["data"], "split": split, "version": VERSION}
    file = (
        runs / "baselines" / f"{hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:20]}.json"
    )
    if file.exists():
        return json.loads(file.read_text())
    if known:
        return {}
    kind = config["task"]["kind"]
    found = (
        {"next_token": _ngrams, "classify": _linear}[kind](config["data"], split) if kind in ("next_token", "classify") else {}
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, found)
    return found


def _ngrams(spec: Mapping[str, Any], split: str) -> Scores:
    """Bits per byte of n-grams with interpolated absolute discounting."""
    train, _ = _events(spec, "train")
    held, size = _events(spec, split)
    begin = 1 + int(max(train.max(), held.max()))  # where no token stands before
    train, held = (np.where(x < 0, begin, x) for x in (train, held))
    p = np.full(len(held), 1 / begin)
    scores = {}
    for order, name in enumerate(ORDERS, 1):
        p = _refined(train[:, -order:], held[:, -order:], begin + 1, p)
        scores[name] = {"eval/bits_per_byte": float(-np.log2(p).sum() / size)}
    return scores


def _events(spec: Mapping[str, Any], split: str) -> tuple[np.ndarray, float]:
    """`[m, 3]`: each target with the two tokens before it, -1 where there is none; and the number of bytes of all targets."""
    found, size = [], 0.0
    for batch in _batches(spec, split):
        tokens, segments, valid = batch["tokens"], batch["segments"], batch["valid"]
        before = np.full_like(tokens, -1)
        before[:, 1:] = np.where(segments[:, 1:] == segments[:, :-1], tokens[:, :-1], -1)
        found.append(np.stack([before, tokens, batch["targets"]], -1)[valid])
        size += float(batch.get("bytes", valid)[valid].sum())
    return np.concatenate(found).astype(np.int64), size


def _refined(train: np.ndarray, held: np.ndarray, base: int, lower: np.ndarray) -> np.ndarray:
    """Probabilities of the last column of `held` given those before, from counts in `train` and the next lower order's probabilities.

    Rows `[m, o]` of an order. Absolute discounting (Ney, Essen and Kneser 1994): `max(c - D, 0) / C + D T / C * lower`, where c counts history and token, C the
    history, T the different tokens seen after it, and `D = n1 / (n1 + 2 n2)` follows from how many pairs were seen once and twice.
    """
    events, counts = np.unique(_packed(train, base), return_counts=True)
    histories, place = np.unique(events // base, return_inverse=True)
    total = np.bincount(place, weights=counts)
    types = np.bincount(place)
    once, twice = (int((counts == n).sum()) for n in (1, 2))
    discount = once / (once + 2 * twice) if once else 0.0
    wanted = _packed(held, base)
    c = _looked_up(wanted, events, counts)
    big, kinds = (_looked_up(wanted // base, histories, x) for x in (total, types))
    seen = big > 0
    big = np.where(seen, big, 1)
    return np.where(seen, (np.maximum(c - discount, 0) + discount * kinds * lower) / big, lower)


def _packed(columns: np.ndarray, base: int) -> np.ndarray:
    """Each row as one number."""
    return columns @ base ** np.arange(columns.shape[1] - 1, -1, -1, dtype=np.int64)


def _looked_up(wanted: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The value of each wanted key; 0 where there is none. `keys` are sorted."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)


def _linear(spec: Mapping[str, Any], split: str) -> Scores:
    """Accuracy of multinomial logistic regression on pixels, without augmentation."""
    from scipy.optimize import minimize

    spec = {**spec, **{name: value for name, value in (("shift", 0), ("flip", False)) if name in spec}}
    (x, y), (held, labels) = (_pixels(spec, part) for part in ("train", split))
    mean, scale = x.mean(0), x.std() + 1e-6
    x, held = ((np.concatenate([(a - mean) / scale, np.ones((len(a), 1))], 1)) for a in (x, held))
    classes = 1 + int(max(y.max(), labels.max()))
    truth = np.eye(classes)[y]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        w = flat.reshape(x.shape[1], classes)
        logits = x @ w
        logits -= logits.max(1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(1, keepdims=True))
        slope = x.T @ (np.exp(logits) - truth) / len(x)
        return -(logits * truth).sum() / len(x) + 5e-4 * (w**2).sum(), (slope + 1e-3 * w).ravel()

    w = minimize(loss, np.zeros(x.shape[1] * classes), jac=True, method="L-BFGS-B", options={"maxiter": 200}).x
    right = (held @ w.reshape(x.shape[1], classes)).argmax(1) == labels
    return {LINEAR: {"eval/accuracy": float(right.mean())}}


def _pixels(spec: Mapping[str, Any], split: str) -> tuple[np.ndarray, np.ndarray]:
    images, labels = [], []
    for batch in _batches(spec, split):
        images.append(batch["image"][batch["valid"]].reshape(int(batch["valid"].sum()), -1))
        labels.append(batch["label"][batch["valid"]])
    return np.concatenate(images).astype(np.float64), np.concatenate(labels)


def _batches(spec: Mapping[str, Any], split: str) -> Iterator[dict[str, np.ndarray]]:
    """One epoch, or enough of it."""
    from moejax import data

    read = 0
    for batch in data.make_iterator(spec, split=split, seed=0, num_epochs=1):
        yield {name: np.asarray(value) for name, value in dict(batch).items()}
        read += batch["valid"].size
        if read >= ENOUGH:
            return
