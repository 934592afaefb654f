"""The final evaluation in blocks, against means and variances worked out with NumPy."""

import numpy as np
import pytest

from moejax.tasks.next_token import NextToken
from moejax.train.blocks import MOST, block_values


def batches(count, rng, domains=0):
    made = []
    for _ in range(count):
        n = 100
        one = {"nll": rng.gamma(100.0), "count": n, "correct": rng.binomial(n, 0.3)}
        if domains:
            one |= {"domain_nll": rng.gamma(50.0, size=domains), "domain_count": np.full(domains, 50)}
        made.append(one)
    return made


def test_with_equal_batches_a_block_is_the_metric_on_its_batch():
    made = batches(6, np.random.default_rng(0))
    found = block_values(NextToken().metrics, made)
    np.testing.assert_allclose(found["loss"], [one["nll"] / 100 for one in made])
    np.testing.assert_allclose(found["accuracy"], [one["correct"] / 100 for one in made])


def test_many_batches_become_few_blocks_whose_mean_is_the_metric():
    made = batches(1000, np.random.default_rng(1), domains=2)
    found = block_values(NextToken(("a", "b")).metrics, made)
    assert {len(values) for values in found.values()} == {MOST}
    assert np.mean(found["a/bits_per_byte"]) == pytest.approx(
        sum(one["domain_nll"][0] for one in made) / 50_000 / np.log(2), rel=1e-6
    )
    # The variance of the mean over batches, estimated from blocks of about 31 of them.
    values = np.array([one["nll"] / 100 for one in made])
    assert np.var(found["loss"], ddof=1) / MOST == pytest.approx(values.var(ddof=1) / 1000, rel=0.6)


def test_unequal_batches_count_by_their_targets():
    made = batches(8, np.random.default_rng(2))
    for one, scale in zip(made, range(1, 9), strict=True):
        one |= {name: scale * value for name, value in one.items()}
    loss = sum(one["nll"] for one in made) / sum(one["count"] for one in made)
    found = block_values(NextToken().metrics, made)["loss"]
    without = [(sum(o["nll"] for o in made) - one["nll"]) / (sum(o["count"] for o in made) - one["count"]) for one in made]
    np.testing.assert_allclose(found, 8 * loss - 7 * np.array(without))


def test_what_one_block_alone_measures_and_one_batch_have_no_blocks():
    made = batches(3, np.random.default_rng(3), domains=2)
    for one in made[1:]:
        one["domain_count"] = np.array([50, 0])
    made[0]["domain_count"] = np.array([50, 50])
    assert set(block_values(NextToken(("a", "b")).metrics, made)) == {"loss", "bits_per_byte", "accuracy", "a/bits_per_byte"}
    assert block_values(NextToken().metrics, made[:1]) == {}
