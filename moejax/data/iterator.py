"""From a configuration to an iterator over batches, and what a data set contains."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import grain

from moejax.core.errors import ConfigError
from moejax.data import storage, tokenizers
from moejax.data.config import TextConfig, check_shards, check_split, parse
from moejax.data.images import image_batches, image_shape
from moejax.data.text import text_batches


def make_iterator(
    config: Any,
    split: str = "train",
    seed: int = 0,
    shard_index: int = 0,
    shard_count: int = 1,
    num_epochs: int | None = None,
) -> grain.DatasetIterator:
    """A Grain iterator over batches of NumPy arrays, prepared ahead by a thread.

    With b rows in this host's share of `data.batch_size`:

      text    `tokens, targets, segments, positions, domain`: int32[b, s]; `valid`: bool[b, s], whether a target counts;
              `example_id`: int64[b]. Segments start at 1 and 0 is padding; `domain` counts in `info(config).domains`.
              The targets are the next tokens of the same document, and a document's last token has none. Unless the
              tokenizer is `bytes`, also `bytes`: int32[b, s], the bytes of text behind each target.
      images  `image`: float32[b, h, w, c] in [0, 1]; `label`: int32[b]; `valid`: bool[b]; `example_id`: int64[b].

    `example_id` is the same in every run (-1 is padding); int64, so keep it off the device.

    `get_state()` is a small JSON-able dictionary and `set_state(state)` goes on bit-exactly, with the same arguments, in
    another process too. `grain.checkpoint.CheckpointSave(iterator)` stores it with Orbax.

    Args:
      config: `config.data`, a mapping; see `DataConfig`, `TextConfig` and `ImageConfig` for its keys.
      split: `train`, `validation` or `test`; some corpora lack one.
      seed: of the order in training, and of augmentation, which only endless training has. The other splits have one fixed order.
      shard_index: this host.
      shard_count: hosts. Their batches, one after the other, are those of a single host (streamed training excepted: see
        `TextConfig.streaming`), and in a finite pass all hosts have equally many.
      num_epochs: passes over the split; the last batch of a finite iterator is filled with rows that are not valid. None is
        endless for `train` and one pass for the other splits.

    Raises:
      ConfigError: names the value, the place and the nearest valid name.
    """
    config = parse(config)
    check_split(config, split)
    check_shards(config, shard_index, shard_count)
    if num_epochs is not None and num_epochs < 1:
        raise ConfigError(f"num_epochs={num_epochs} must be at least 1, or None")
    if num_epochs is None and split != "train":
        num_epochs = 1
    batches = text_batches if isinstance(config, TextConfig) else image_batches
    return iter(batches(config, split, seed, shard_index, shard_count, num_epochs))


@dataclass(frozen=True)
class DataInfo:
    """What a data set contains.

    Attributes:
      name: of the data set.
      kind: `text` or `image`.
      sizes: split -> documents or images in it.
      domains: the names behind a batch's `domain`; empty for images.
      vocab_size: different token ids; 0 for images.
      num_classes: labels; 0 for text.
      image_shape: height, width, channels; empty for text.
    """

    name: str
    kind: str
    sizes: Mapping[str, int]
    domains: tuple[str, ...] = ()
    vocab_size: int = 0
    num_classes: int = 0
    image_shape: tuple[int, ...] = ()

    @property
    def train_size(self) -> int:
        """Documents or images to train on."""
        return self.sizes["train"]


def check_covers(model: Mapping[str, Any], info: Any, tokenizer: str = "bytes") -> None:
    """Refuses a model that has fewer tokens or classes than the data: their embeddings and logits would be none.

    Args:
      model: its config.
      info: of the data; what it does not say is not compared.

    Raises:
      ConfigError: names both numbers.
    """
    for name, what in (("vocab_size", f"tokens of data.tokenizer='{tokenizer}'"), ("num_classes", "classes of the data")):
        has, needs = model.get(name), getattr(info, name, 0)
        if isinstance(has, int) and has < needs:
            raise ConfigError(f"model.{name}={has} is less than the {needs} {what}; set model.{name} to {needs} or more")


def info(config: Any) -> DataInfo:
    """What `config.data` describes; embedded data sets, and one's own files, are prepared on the way, once.

    Raises:
      ConfigError: as `make_iterator`.
    """
    config = parse(config)
    builder, dataset = storage.open_dataset(config)
    sizes = {split: builder.info.splits[expression].num_examples for split, expression in dataset.splits.items()}
    if isinstance(config, TextConfig):
        vocab_size = tokenizers.load(config.tokenizer).vocab_size
        return DataInfo(config.name, "text", sizes, domains=config.domains, vocab_size=vocab_size)
    num_classes = builder.info.features[dataset.label].num_classes
    shape = image_shape(config, builder, dataset)
    return DataInfo(config.name, "image", sizes, num_classes=num_classes, image_shape=shape)
