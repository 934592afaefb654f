"""Routing written out in NumPy, one token after the other, from the definitions: what tests compare the library with.

Everything here is about one group: `logits[n, e]`, `valid[n]`.
"""

import math
from fractions import Fraction

import numpy as np


def softmax(x: np.ndarray, axis: int | tuple[int, ...] = -1) -> np.ndarray:
    x = np.asarray(x, np.float64)
    exp = np.exp(x - x.max(axis, keepdims=True))
    return exp / exp.sum(axis, keepdims=True)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


SCORES = {"softmax": softmax, "softmax_selected": lambda x: x, "sigmoid": sigmoid, "logit": lambda x: x}


def best(values: np.ndarray, k: int) -> np.ndarray:
    """Indices of the k largest values, the lowest index first among equals."""
    return np.array(sorted(range(len(values)), key=lambda i: (-values[i], i))[:k], int)


def top_k(
    logits: np.ndarray,
    k: int,
    score: str = "softmax",
    normalise: bool = False,
    scale: float = 1.0,
    bias: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Experts and weights `[n, k]`."""
    experts, weights = [], []
    for row in np.asarray(logits, np.float64):
        scores = SCORES[score](row)
        chosen = best(row if bias is None else scores + bias, k)
        weight = softmax(row[chosen]) if score == "softmax_selected" else scores[chosen]
        experts.append(chosen)
        weights.append(scale * weight / (weight.sum() if normalise else 1))
    return np.array(experts), np.array(weights)


def capacity(n: int, e: int, k: int, factor: float) -> int:
    """ceil(n k factor / e), at least 1 and at most n, in exact arithmetic."""
    return min(n, max(1, math.ceil(Fraction(str(factor)) * n * k / e))) if n else 0


def service_order(priority: str, score: np.ndarray, k: int) -> list[tuple[int, int]]:
    """Pairs of token and choice in the order in which experts admit them."""
    n = len(score)
    if priority == "token":
        return [(t, j) for t in range(n) for j in range(k)]
    tokens = best(score, n) if priority == "score" else range(n)
    return [(int(t), j) for j in range(k) for t in tokens]


def admit(expert: np.ndarray, wanted: np.ndarray, order: list[tuple[int, int]], slots: int) -> np.ndarray:
    """Which wanted choices `[n, k]` find a free slot when they come in this order."""
    taken: dict[int, int] = {}
    kept = np.zeros_like(wanted)
    for t, j in order:
        i = int(expert[t, j])
        if wanted[t, j] and taken.get(i, 0) < slots:
            taken[i] = taken.get(i, 0) + 1
            kept[t, j] = True
    return kept


def combine(expert: np.ndarray, weight: np.ndarray, used: np.ndarray, e: int) -> np.ndarray:
    """The combine matrix `[n, e]`."""
    out = np.zeros((len(expert), e))
    for t, j in np.argwhere(used):
        out[t, expert[t, j]] += weight[t, j]
    return out


def expert_choice(
    logits: np.ndarray, valid: np.ndarray, factor: float, score: str = "softmax", normalise: bool = False
) -> list[list[tuple[int, float]]]:
    """For each expert its tokens and their weights, best first."""
    e = logits.shape[1]
    scores = SCORES[score](np.asarray(logits, np.float64))
    slots = capacity(int(valid.sum()), e, 1, factor)
    tokens = np.flatnonzero(valid)
    chosen = [[int(tokens[j]) for j in best(scores[tokens, i], slots)] for i in range(e)]
    total = {t: sum(scores[t, i] for i in range(e) if t in chosen[i]) for t in tokens}
    return [[(t, scores[t, i] / (total[t] if normalise else 1)) for t in chosen[i]] for i in range(e)]
