"""Grain pipelines from documents to batches of packed rows.

Corpora that fit in memory are packed once into rows with random access: every order is a permutation of row indices, and an
iterator's state is one number. Larger corpora are streamed: documents are cut, shuffled and packed while they are read.
"""

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import grain
import numpy as np
from grain.sources import RandomAccessDataSource

from moejax.core.errors import ConfigError
from moejax.data import storage, tokenizers
from moejax.data.config import TextConfig, check_split
from moejax.data.order import batched, check_memory, check_rows, derive_seed, ordered, padded, with_workers
from moejax.data.packing import Corpus, PackedRows, cut, empty_row, example_id

# Streamed windows are shuffled within a buffer of this many, so that the windows of a long document do not come in a run.
_SHUFFLE_WINDOWS = 1024
# Rows that are filled at a time when streaming: more of them waste less padding, but a restart has to read more again.
_OPEN_ROWS = 64
# What is known of each token of a streamed window; packed by Grain as the columns of one array.
_COLUMNS = ("tokens", "targets", "valid", "domain", "bytes")


def text_batches(
    config: TextConfig, split: str, seed: int, shard_index: int, shard_count: int, num_epochs: int | None
) -> grain.IterDataset:
    """Batches of rows. Arguments and batch as in `moejax.data.make_iterator`, but `num_epochs` None is endless."""
    check_memory(config, 21 * config.seq_len + 8, config.batch_size // shard_count)
    builder, dataset = storage.open_dataset(config)
    check_split(config, split, dataset)
    decode = Decode(dataset.text, dataset.domains or (config.base,), config.domains, config.tokenizer)
    shuffle = config.shuffle and split == "train"
    streaming = config.streaming
    if streaming is None:
        streaming = not storage.fits_in_memory(builder) and config.mixture is None
    if streaming:
        examples = storage.open_split(builder, dataset.splits[split], config.name)
        size = builder.info.splits[dataset.splits[split]].num_bytes
        if num_epochs is None and size:
            # How many rows there are nobody knows before they are read, but a document has no more tokens than bytes.
            check_rows(config, len(examples) + size // config.seq_len, split)
        return _streamed(config, examples, decode, seed, shuffle, shard_index, shard_count, num_epochs)

    corpus = read_corpus(str(builder.data_dir), dataset.splits[split], decode)
    rows = []
    for i, domain in enumerate(config.domains):
        packed = PackedRows(corpus, np.flatnonzero(corpus.domain == i), config.seq_len, config.packing)
        if not len(packed):
            raise ConfigError(f"domain '{domain}' in data.domains has no documents in split '{split}' of '{config.name}'")
        rows.append(grain.MapDataset.source(packed))
    if num_epochs is None:
        check_rows(config, sum(map(len, rows)), split)
    if num_epochs is None and config.mixture:
        parts = [ordered(part, derive_seed(seed, i), shuffle, None) for i, part in enumerate(rows)]
        order = grain.MapDataset.mix(parts, [weight for _, weight in config.mixture])
    else:
        order = ordered(grain.MapDataset.concatenate(rows), seed, shuffle, num_epochs)
    if num_epochs is not None:
        order = padded(order, empty_row(config.seq_len, corpus.sizes is not None), config.batch_size)
    return batched(order, config, shard_index, shard_count)


@dataclass(frozen=True)
class Decode:
    """From a TFDS example to tokens. Hashable, so that it can name a corpus in a cache.

    Attributes:
      text: the feature with the text.
      names: the domains of the data set, in the order of the feature `domain`.
      domains: those to read; a batch's `domain` counts in this tuple.
      tokenizer: as in the configuration.
    """

    text: str
    names: tuple[str, ...]
    domains: tuple[str, ...]
    tokenizer: str

    def __call__(self, index: int, example: dict[str, Any]) -> dict[str, Any] | None:
        """Document `index` as `{tokens, sizes, domain, id}`; None if its domain is not read."""
        name = self.names[int(example["domain"])] if len(self.names) > 1 else self.names[0]
        if name not in self.domains:
            return None
        tokens, sizes = tokenizers.load(self.tokenizer).encode(example[self.text])
        return {"tokens": tokens, "sizes": sizes, "domain": self.domains.index(name), "id": index}


# Studies open the same splits for every arm and seed.
@lru_cache(maxsize=8)
def read_corpus(folder: str, expression: str, decode: Decode) -> Corpus:
    """All documents of a prepared split in memory; `folder` is that of the TFDS data set, down to its version."""
    examples = storage.open_split(storage.open_folder(folder), expression, folder)
    decoded = (decode(i, examples[i]) for i in range(len(examples)))
    documents = [document for document in decoded if document is not None]

    def joined(name: str) -> np.ndarray:
        return np.concatenate([document[name] for document in documents] + [np.zeros(0, np.int32)])

    return Corpus(
        tokens=joined("tokens"),
        offsets=np.cumsum([0] + [len(document["tokens"]) for document in documents]),
        domain=np.array([document["domain"] for document in documents], np.int32),
        ids=np.array([document["id"] for document in documents], np.int64),
        sizes=None if any(document["sizes"] is None for document in documents) else joined("sizes"),
    )


def _streamed(
    config: TextConfig,
    examples: RandomAccessDataSource,
    decode: Decode,
    seed: int,
    shuffle: bool,
    shard_index: int,
    shard_count: int,
    num_epochs: int | None,
) -> grain.IterDataset:
    # Rows cannot be counted without reading, so hosts can only be kept in step in one of two ways. In endless training each
    # host packs documents of its own. In a finite pass each packs all of them and takes its rows of every global batch.
    size = len(examples)
    documents = grain.MapDataset.source(examples).map_with_index(lambda i, example: decode(i % size, example))
    order = ordered(documents, seed, shuffle, num_epochs)
    if num_epochs is None:
        order = order[shard_index::shard_count]
    windows = grain.experimental.FlatMapIterDataset(
        order.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=16)), _Cut(config.seq_len)
    )
    if shuffle:
        windows = grain.experimental.WindowShuffleIterDataset(windows, window_size=_SHUFFLE_WINDOWS, seed=derive_seed(seed, 1))
    rows = grain.experimental.FirstFitPackIterDataset(
        windows,
        length_struct={"columns": config.seq_len},
        num_packing_bins=_OPEN_ROWS,
        seed=derive_seed(seed, 2),
        shuffle_bins=shuffle,
        meta_features=("example_id",),
        max_sequences_per_bin=None if config.packing else 1,
    ).map(_row)
    if num_epochs is None:
        batches = rows.batch(config.batch_size // shard_count)
    else:
        batches = rows.batch(config.batch_size, batch_fn=partial(_pad, batch_size=config.batch_size)).map(
            lambda batch: {key: np.split(value, shard_count)[shard_index] for key, value in batch.items()}
        )
    if config.workers:
        return with_workers(batches, config)
    return grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=config.prefetch)


class _Cut(grain.experimental.FlatMapTransform):
    """A document's windows, as columns that Grain can pack."""

    def __init__(self, seq_len: int):
        self._seq_len = seq_len

    def flat_map(self, element: dict[str, Any]) -> list[dict[str, Any]]:
        tokens = element["tokens"]
        sizes = element["sizes"]
        columns = np.zeros((len(tokens), len(_COLUMNS) - (sizes is None)), np.int32)
        columns[:, 0] = tokens
        columns[:-1, 1] = tokens[1:]
        columns[:-1, 2] = 1
        columns[:, 3] = element["domain"]
        if sizes is not None:
            columns[:-1, 4] = sizes[1:]
        return [
            {
                "columns": columns[start : start + length],
                "example_id": example_id(element["id"], start // self._seq_len),
            }
            for _, start, length in cut(np.array([len(tokens)]), np.zeros(1, int), self._seq_len)
        ]


def _row(packed: dict[str, Any]) -> dict[str, np.ndarray]:
    columns = packed["columns"]
    row = {name: columns[:, i] for i, name in enumerate(_COLUMNS[: columns.shape[1]])}
    return row | {
        "valid": row["valid"].astype(bool),
        "segments": packed["columns_segment_ids"],
        "positions": packed["columns_positions"],
        "example_id": np.int64(packed["example_id"][0]),
    }


def _pad(rows: list[dict[str, np.ndarray]], batch_size: int) -> dict[str, np.ndarray]:
    empty = empty_row(len(rows[0]["tokens"]), "bytes" in rows[0])
    rows = list(rows) + [empty] * (batch_size - len(rows))
    return {key: np.stack([row[key] for row in rows]) for key in empty}
