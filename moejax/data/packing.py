"""Documents cut into windows and windows packed into rows of `s` tokens. Pure NumPy.

A document longer than `s` is cut into consecutive windows; every token of it lies in exactly one. The targets of a window
reach one token into the next window, so only the last token of a *document* has no target. Full windows are rows by
themselves, and the shorter last windows share rows. Within a row each window is a segment (1, 2, ...; 0 is padding), and
positions count from 0 in each segment.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

# Room for the windows of a document within an example_id.
_WINDOWS = 2**20


class Window(NamedTuple):
    """Tokens `start : start + length` of document `document` (an index into a corpus)."""

    document: int
    start: int
    length: int


@dataclass(frozen=True)
class Corpus:
    """The documents of one split, end to end.

    Attributes:
      tokens: all tokens.
      offsets: document i is `tokens[offsets[i] : offsets[i + 1]]`.
      domain: the index of each document's domain.
      ids: each document's place in the prepared split, which does not depend on which domains are read.
      sizes: bytes of text behind each token; None where every token is a byte.
    """

    tokens: Int[np.ndarray, "t"]
    offsets: Int[np.ndarray, "documents_1"]
    domain: Int[np.ndarray, "documents"]
    ids: Int[np.ndarray, "documents"]
    sizes: Int[np.ndarray, "t"] | None = None

    @property
    def lengths(self) -> Int[np.ndarray, "documents"]:
        return np.diff(self.offsets)


class PackedRows:
    """Random access to the rows of some documents of a corpus; a Grain source.

    Rows come in the order of their first window: by document, then by place within it.
    """

    def __init__(self, corpus: Corpus, documents: Int[np.ndarray, "chosen"], seq_len: int, packing: bool):
        self._corpus = corpus
        self._seq_len = seq_len
        self._rows = pack(cut(corpus.lengths, documents, seq_len), seq_len, packing)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        windows = self._rows[index]
        row = empty_row(self._seq_len, self._corpus.sizes is not None)
        at = 0
        for segment, (document, start, length) in enumerate(windows, start=1):
            end = self._corpus.offsets[document + 1]
            first = self._corpus.offsets[document] + start
            targets = min(length, end - first - 1)
            row["tokens"][at : at + length] = self._corpus.tokens[first : first + length]
            row["targets"][at : at + targets] = self._corpus.tokens[first + 1 : first + 1 + targets]
            if self._corpus.sizes is not None:
                row["bytes"][at : at + targets] = self._corpus.sizes[first + 1 : first + 1 + targets]
            row["valid"][at : at + targets] = True
            row["segments"][at : at + length] = segment
            row["positions"][at : at + length] = np.arange(length)
            row["domain"][at : at + length] = self._corpus.domain[document]
            at += length
        row["example_id"] = example_id(int(self._corpus.ids[windows[0].document]), windows[0].start // self._seq_len)
        return row


def cut(lengths: Int[np.ndarray, "documents"], documents: Int[np.ndarray, "chosen"], seq_len: int) -> list[Window]:
    """The windows of some documents, in order."""
    return [
        Window(document, start, min(seq_len, int(lengths[document]) - start))
        for document in documents.tolist()
        for start in range(0, int(lengths[document]), seq_len)
    ]


def pack(windows: Sequence[Window], seq_len: int, packing: bool) -> list[list[Window]]:
    """Rows of windows that fit into `seq_len`, by best fit over the windows from long to short.

    Each window goes to the fullest row that still has room for it. Without `packing` each window is a row.
    """
    if not packing:
        return [[window] for window in windows]
    rows: list[list[Window]] = []
    free: list[tuple[int, int]] = []  # (tokens free, row) of the rows with room, ascending
    for window in sorted(windows, key=lambda w: -w.length):
        place = bisect.bisect_left(free, (window.length, 0))
        if place < len(free):
            left, row = free.pop(place)
            rows[row].append(window)
        else:
            left, row = seq_len, len(rows)
            rows.append([window])
        if left > window.length:
            bisect.insort(free, (left - window.length, row))
    return sorted(rows)


def empty_row(seq_len: int, sized: bool = False) -> dict[str, np.ndarray]:
    """A row of padding: segment 0, nothing valid, `example_id` -1; with `bytes` if it is `sized`."""
    names = ("tokens", "targets", "segments", "positions", "domain", *(("bytes",) if sized else ()))
    row = {key: np.zeros(seq_len, np.int32) for key in names}
    return row | {"valid": np.zeros(seq_len, bool), "example_id": np.int64(-1)}


def example_id(document: int, window: int) -> np.int64:
    """Identifies a row by its first window, the same in every run: `document, window = divmod(example_id, 2**20)`."""
    return np.int64(document * _WINDOWS + window)
