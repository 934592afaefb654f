"""What is counted in training data for a model to be built on: how often tokens occur, which ones occur alike, which follow."""

import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from ml_collections import ConfigDict

from moejax.data.iterator import make_iterator

Config = Mapping[str, Any] | ConfigDict


def token_frequencies(
    config: Config, vocab_size: int, batches: int = 64, seed: int = 0, make_iterator: Callable[..., Any] = make_iterator
) -> tuple[float, ...]:
    """Occurrences of each vocabulary id among the valid positions of the first batches of the training split.

    Args:
      config: a run's `data` section, of text.
      vocab_size: v, the length of the result.
      batches: how many to count; fewer if the split is shorter.
      seed: of the order of the data.
      make_iterator: where batches come from.
    """
    counts = np.zeros(vocab_size)
    for batch in _first(make_iterator, config, batches, seed):
        counts += np.bincount(batch["tokens"][batch["valid"]], minlength=vocab_size)
    return tuple(counts.tolist())


def token_clusters(
    config: Config,
    vocab_size: int,
    clusters: int,
    width: int = 32,
    batches: int = 64,
    seed: int = 0,
    make_iterator: Callable[..., Any] = make_iterator,
) -> tuple[int, ...]:
    """A cluster for each vocabulary id: k-means of vectors that say which tokens come before and after it.

    The vectors are the leading left singular vectors of the positive pointwise mutual information of neighbours (Levy and Goldberg
    2014: what skip-gram embeddings factorise), scaled by the roots of their singular values and brought to length 1. Arguments as
    in `token_frequencies`, and

    Args:
      clusters: how many.
      width: of the vectors; less for vocabularies that are smaller.
    """
    counts = _pairs(_first(make_iterator, config, batches, seed), vocab_size)
    return tuple(_clusters(_vectors(counts, width), clusters, seed).tolist())


def token_successors(
    config: Config, vocab_size: int, batches: int = 64, seed: int = 0, make_iterator: Callable[..., Any] = make_iterator
) -> tuple[int, ...]:
    """The id that most often follows each vocabulary id, the lowest of several; 0 after one that was not seen. Arguments as above."""
    counts = _pairs(_first(make_iterator, config, batches, seed), vocab_size)
    return tuple(np.asarray(counts.argmax(axis=1)).ravel().tolist())


def _clusters(points: Float[np.ndarray, "v d"], clusters: int, seed: int) -> Int[np.ndarray, "v"]:
    """Lloyd's algorithm from k-means++ seeds (Arthur and Vassilvitskii 2007)."""
    from scipy.cluster.vq import kmeans2

    with warnings.catch_warnings(action="ignore"):  # of a cluster that loses all its points: it stays where it was
        return kmeans2(points, clusters, iter=50, minit="++", rng=np.random.default_rng(seed))[1].astype(np.int64)


def _first(make_iterator: Callable[..., Any], config: Config, batches: int, seed: int) -> Iterator[Mapping[str, Any]]:
    return itertools.islice(make_iterator(config, split="train", seed=seed, num_epochs=1), batches)


def _pairs(batches: Iterator[Mapping[str, Any]], vocab_size: int) -> Any:
    """A sparse matrix of how often each id is followed by each."""
    from scipy.sparse import coo_array

    pairs = [(batch["tokens"], batch["targets"], batch["valid"]) for batch in batches]
    before, after = (np.concatenate([part[i][part[2]] for part in pairs]) for i in (0, 1))
    return coo_array((np.ones(len(before)), (before, after)), shape=(vocab_size, vocab_size)).tocsr()


def _vectors(counts: Any, width: int) -> Float[np.ndarray, "v d"]:
    """A vector for each row of the sparse matrix of how often one id precedes another."""
    from scipy.sparse import hstack
    from scipy.sparse.linalg import svds

    pairs = hstack([counts, counts.T]).tocoo()
    rows, columns = pairs.sum(1), pairs.sum(0)
    information = np.log(pairs.data * pairs.data.sum() / (rows[pairs.row] * columns[pairs.col]))
    pairs.data = np.maximum(information, 0)
    u, s, _ = svds(pairs.tocsr(), k=min(width, pairs.shape[0] - 1), v0=np.ones(pairs.shape[0]))
    vectors = u * np.sqrt(s)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
