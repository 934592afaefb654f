"""The order of examples, their division among hosts, and batches: the part that text and images share.

One global order is drawn from the seed, and host i of n takes the i-th of n equal blocks of each batch. The hosts' batches
of a step, one after the other, are therefore the batch that a single host would have had, whatever n is.
"""

from collections.abc import Mapping
from typing import Any

import grain
import numpy as np
from absl import flags

from moejax.core.errors import ConfigError
from moejax.core.machine import gigabytes, memory
from moejax.data.config import DataConfig

# Evaluation has the same order in every run, but not that of the files: any first few batches are then a fair sample.
_FIXED = 0x5EED


def check_memory(config: DataConfig, row_bytes: int, rows: int) -> None:
    """Refuses batches that this machine cannot hold, before anything of one is made.

    Args:
      row_bytes: of one row or image.
      rows: of a batch in this process.

    Raises:
      ConfigError: naming the sizes.
    """
    # One that is made, one that is used, and those between them.
    needed, there = row_bytes * rows * (config.prefetch + 2), memory()
    if needed > there:
        raise ConfigError(
            f"data.batch_size={config.batch_size} is {gigabytes(row_bytes * rows)} a batch in each process, and data.prefetch="
            f"{config.prefetch} of them lie ready: this machine has {gigabytes(there)}; make one of them smaller"
        )


def check_rows(config: DataConfig, rows: int, split: str) -> None:
    """Refuses a training batch that has more rows than the data: some of them would be in it twice.

    Raises:
      ConfigError: naming both.
    """
    if config.batch_size > rows:
        raise ConfigError(
            f"data.batch_size={config.batch_size} is more than the {rows} rows of split '{split}' of '{config.name}'; take at most {rows}"
        )


def derive_seed(seed: int, *salt: int) -> int:
    """A 32-bit seed. Grain adds the epoch to it, so neighbouring user seeds must not give neighbouring seeds."""
    return int(np.random.SeedSequence([seed % 2**64, *salt]).generate_state(1)[0])


def ordered(examples: grain.MapDataset, seed: int, shuffle: bool, num_epochs: int | None) -> grain.MapDataset:
    """`num_epochs` passes (endlessly many if None), each in an order of its own with `shuffle`, else in one fixed order."""
    if shuffle:
        return examples.shuffle(seed=derive_seed(seed)).repeat(num_epochs)
    return examples.shuffle(seed=_FIXED).repeat(num_epochs, reseed_each_epoch=False)


def padded(examples: grain.MapDataset, padding: Mapping[str, Any], multiple: int) -> grain.MapDataset:
    """A finite order, lengthened with `padding` to a whole number of global batches: all hosts then have equally many."""
    missing = -len(examples) % multiple
    if not missing:
        return examples
    return grain.MapDataset.concatenate([examples, grain.MapDataset.source([dict(padding)] * missing)])


def batched(examples: grain.MapDataset, config: DataConfig, shard_index: int, shard_count: int) -> grain.IterDataset:
    """One host's batches, prepared ahead by a thread (or by processes)."""
    own = examples.batch(config.batch_size // shard_count)[shard_index::shard_count]
    batches = own.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=config.prefetch))
    return with_workers(batches, config)


def with_workers(batches: grain.IterDataset, config: DataConfig) -> grain.IterDataset:
    """Moves the work to `config.workers` processes, if there are any."""
    if not config.workers:
        return batches
    if not flags.FLAGS.is_parsed():
        # Grain reads its flags in the workers' threads; programs that do not use absl never parse any.
        flags.FLAGS.mark_as_parsed()
    return batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=config.workers))
