"""Grain pipelines from labelled images to batches."""

import math
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from jaxtyping import Float

from moejax.core.errors import ConfigError
from moejax.data import storage
from moejax.data.catalog import ImageDataset
from moejax.data.config import ImageConfig, check_split
from moejax.data.order import batched, check_memory, check_rows, derive_seed, ordered, padded
from moejax.data.pixels import resize


def image_batches(
    config: ImageConfig, split: str, seed: int, shard_index: int, shard_count: int, num_epochs: int | None
) -> grain.IterDataset:
    """Batches of images. Arguments and batch as in `moejax.data.make_iterator`, but `num_epochs` None is endless."""
    builder, dataset = storage.open_dataset(config)
    check_split(config, split, dataset)
    shape = image_shape(config, builder, dataset)
    check_memory(config, 4 * math.prod(shape) + 13, config.batch_size // shard_count)
    examples = storage.open_split(builder, dataset.splits[split], config.name)
    if num_epochs is None:
        check_rows(config, len(examples), split)
    if storage.fits_in_memory(builder):
        examples = storage.Held(examples)
    images = grain.MapDataset.source(examples).map_with_index(Decode(dataset, config.image_size, len(examples)))
    order = ordered(images, seed, config.shuffle and split == "train", num_epochs)
    # A pass that ends looks at the images as they are: it evaluates.
    if split == "train" and num_epochs is None and (config.shift or config.flip):
        order = order.random_map(Augment(config.shift, config.flip), seed=derive_seed(seed, 1))
    if num_epochs is not None:
        order = padded(order, _empty(shape), config.batch_size)
    return batched(order, config, shard_index, shard_count)


def image_shape(config: ImageConfig, builder: Any, dataset: ImageDataset) -> tuple[int, int, int]:
    """Height, width and channels of a batch's images.

    Raises:
      ConfigError: the data set's images differ in size and `data.image_size` is unset.
    """
    height, width, channels = builder.info.features[dataset.image].shape
    if config.image_size is not None:
        return config.image_size, config.image_size, channels
    if height is None or width is None:
        raise ConfigError(f"the images of '{config.name}' differ in size; set data.image_size, to 224 for example")
    return height, width, channels


@dataclass(frozen=True)
class Decode:
    """From a TFDS example to an image in [0, 1], its label and its `example_id`, the place in the prepared split."""

    dataset: ImageDataset
    size: int | None
    count: int

    def __call__(self, index: int, example: dict[str, Any]) -> dict[str, np.ndarray]:
        pixels = example[self.dataset.image]
        if self.size is not None:
            pixels = resize(pixels, self.size)
        return {
            "image": pixels.astype(np.float32) / np.float32(self.dataset.white),
            "label": np.int32(example[self.dataset.label]),
            "valid": np.bool_(True),
            "example_id": np.int64(index % self.count),
        }


@dataclass(frozen=True)
class Augment:
    """A random shift by up to `shift` pixels each way (zeros come in) and, with `flip`, a mirror image half of the time."""

    shift: int
    flip: bool

    def __call__(self, example: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        image = example["image"]
        height, width, _ = image.shape
        framed = np.pad(image, ((self.shift, self.shift), (self.shift, self.shift), (0, 0)))
        down, right = rng.integers(0, 2 * self.shift + 1, size=2)
        image = framed[down : down + height, right : right + width]
        if self.flip and rng.random() < 0.5:
            image = image[:, ::-1]
        return example | {"image": np.ascontiguousarray(image)}


def _empty(shape: tuple[int, int, int]) -> dict[str, Any]:
    image: Float[np.ndarray, "h w c"] = np.zeros(shape, np.float32)
    return {"image": image, "label": np.int32(0), "valid": np.bool_(False), "example_id": np.int64(-1)}
