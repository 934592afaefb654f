"""The final evaluation in blocks of batches: what it would take to say how much another evaluation set might have changed it.

A block's value of a metric is the jackknife's pseudo-value, `B m - (B - 1) m_without`, of the metric `m` of the whole set and the metric
without that block. Its mean over blocks is `m` for a mean of equally many targets a block, and `m` up to the jackknife's own
correction otherwise; the variance of its mean over blocks is the sampling variance of `m`. It needs nothing of a metric but its
definition from sums, whatever it divides by what (Miller 1974, "The jackknife: a review").
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

MOST = 32  # blocks that are kept

Sums = Mapping[str, Any]


def block_values(metrics: Callable[[Sums], Mapping[str, float]], batches: Sequence[Sums]) -> dict[str, list[float]]:
    """Metric -> its value on each of at most `MOST` blocks of consecutive batches; nothing of a metric that a block alone measures.

    Args:
      metrics: of sums, a task's.
      batches: the sums of each batch, all with the same names.
    """
    if len(batches) < 2:
        return {}
    edges = np.linspace(0, len(batches), min(MOST, len(batches)) + 1).round().astype(int)
    blocks = [_total(batches[a:b]) for a, b in itertools.pairwise(edges)]
    whole = _total(blocks)
    count = len(blocks)
    without = [metrics({name: whole[name] - block[name] for name in whole}) for block in blocks]
    return {
        name: [count * value - (count - 1) * rest[name] for rest in without]
        for name, value in metrics(whole).items()
        if all(np.isfinite(rest.get(name, np.nan)) for rest in without)
    }


def _total(sums: Sequence[Sums]) -> dict[str, Any]:
    return {name: sum(np.asarray(each[name], np.float64) for each in sums) for name in sums[0]}
