"""How often each token occurs in training data, for what is built on such counts (balanced hash layers)."""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from moejax.data.iterator import make_iterator


def token_frequencies(
    config: Mapping[str, Any] | ConfigDict, vocab_size: int, batches: int = 64, seed: int = 0
) -> tuple[float, ...]:
    """Occurrences of each vocabulary id among the valid positions of the first batches of the training split.

    Args:
      config: a run's `data` section, of text.
      vocab_size: v, the length of the result.
      batches: how many to count; fewer if the split is shorter.
      seed: of the order of the data.
    """
    counts = np.zeros(vocab_size)
    for batch in itertools.islice(make_iterator(config, split="train", seed=seed, num_epochs=1), batches):
        counts += np.bincount(batch["tokens"][batch["valid"]], minlength=vocab_size)
    return tuple(counts.tolist())
