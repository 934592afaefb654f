"""Counting tokens."""

import numpy as np

from moejax.data import make_iterator, token_frequencies


def test_counts_are_those_of_the_batches() -> None:
    config = {"name": "embedded_text", "batch_size": 2, "seq_len": 64}
    counts = np.array(token_frequencies(config, 256, batches=3))
    batches = make_iterator(config, split="train", seed=0, num_epochs=1)
    expected = np.zeros(256)
    for _ in range(3):
        batch = next(batches)
        for token, valid in zip(batch["tokens"].ravel(), batch["valid"].ravel(), strict=True):
            expected[token] += valid
    np.testing.assert_array_equal(counts, expected)
    assert counts.argmax() == ord(" ")
