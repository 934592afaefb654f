"""Data: TFDS on disk, Grain in memory, NumPy batches out.

    from moejax.data import make_iterator

    batches = make_iterator(dict(name="embedded_text", batch_size=16, seq_len=256), split="train", seed=0)
    batch = next(batches)  # tokens, targets, valid, segments, positions, domain: [16, 256]

`DATASETS` lists the names. The embedded ones are made from installed packages and need no network; the others are read from a
folder that TFDS prepared. `python -m moejax.data` prepares the embedded ones and shows what they hold.
"""

from moejax.core.folders import lazy

__getattr__, __dir__ = lazy(__name__)
