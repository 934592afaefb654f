"""A plain-Python account of what the rows of an epoch must hold, and the same account read off the rows."""

from collections import Counter

import numpy as np


def expected_segments(documents, domains, seq_len):
    """Every window of every document as (tokens, targets with None where there is none, domain)."""
    found = Counter()
    for document, domain in zip(documents, domains, strict=True):
        following = [*document[1:], None]
        for start in range(0, len(document), seq_len):
            stop = start + seq_len
            found[tuple(document[start:stop]), tuple(following[start:stop]), domain] += 1
    return found


def segments_of(rows):
    """The same account, read off rows of a batch; checks positions, padding and segment numbers on the way."""
    found = Counter()
    for row in rows:
        last = int(row["segments"].max())
        at = 0
        for segment in range(1, last + 1):
            (where,) = np.nonzero(row["segments"] == segment)
            assert where[0] == at, "segments lie one after another"
            np.testing.assert_array_equal(where, np.arange(at, at + len(where)))
            np.testing.assert_array_equal(row["positions"][where], np.arange(len(where)))
            at += len(where)
            targets = [int(t) if v else None for t, v in zip(row["targets"][where], row["valid"][where], strict=True)]
            (domain,) = set(row["domain"][where].tolist())
            found[tuple(row["tokens"][where].tolist()), tuple(targets), domain] += 1
        for key in ("tokens", "targets", "segments", "positions", "domain", "valid"):
            assert not row[key][at:].any(), f"{key} of padding must be zero"
    return found
