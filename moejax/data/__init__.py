"""Data: TFDS on disk, Grain in memory, NumPy batches out.

    from moejax.data import make_iterator

    batches = make_iterator(dict(name="embedded_text", batch_size=16, seq_len=256), split="train", seed=0)
    batch = next(batches)  # tokens, targets, valid, segments, positions, domain: [16, 256]

`DATASETS` lists the names. The embedded ones are made from installed packages and need no network; the others are read from a
folder that TFDS prepared. `python -m moejax.data` prepares the embedded ones and shows what they hold.
"""

from moejax.data.catalog import DATASETS
from moejax.data.computed import with_computed
from moejax.data.config import DataConfig, ImageConfig, TextConfig
from moejax.data.frequencies import token_clusters, token_frequencies, token_successors
from moejax.data.iterator import DataInfo, info, make_iterator
from moejax.data.storage import prepare

__all__ = [
    "DATASETS",
    "DataConfig",
    "DataInfo",
    "ImageConfig",
    "TextConfig",
    "info",
    "make_iterator",
    "prepare",
    "token_clusters",
    "token_frequencies",
    "token_successors",
    "with_computed",
]
