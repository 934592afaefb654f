"""TFDS builders that write the embedded data sets as array_record files. TensorFlow is never imported."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from moejax.data.builders import sources


class EmbeddedText(tfds.core.GeneratorBasedBuilder):
    """Python code, reference prose and literature from installed packages, one example a document."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description=self.__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "text": tfds.features.Text(),
                    "domain": tfds.features.ClassLabel(names=list(sources.TEXT_DOMAINS)),
                    "source": tfds.features.Text(),
                }
            ),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
        del dl_manager  # nothing is downloaded
        return {split: self._generate_examples(documents) for split, documents in sources.text_splits().items()}

    def _generate_examples(self, documents: list[sources.Document]) -> Iterator[tuple[str, dict[str, Any]]]:
        for document in documents:
            example = {"text": document.text, "domain": document.domain, "source": document.source}
            yield document.digest.hex(), example


class _EmbeddedImages(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Images and labels of `sources.images`, one example an image."""

    VERSION = tfds.core.Version("1.0.0")
    _shape: tuple[int, int, int]

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description=self.__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Tensor(shape=self._shape, dtype=np.uint8),
                    "label": tfds.features.ClassLabel(num_classes=10),
                    "index": tfds.features.Scalar(dtype=np.int64),  # the image's place in its file
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        del dl_manager
        images, labels = sources.images(self.name)
        splits = sources.image_splits(images)
        return {split: self._generate_examples(images, labels, indices) for split, indices in splits.items()}

    def _generate_examples(
        self, images: np.ndarray, labels: np.ndarray, indices: list[int]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for i in indices:
            yield i, {"image": images[i], "label": int(labels[i]), "index": i}


class EmbeddedDigits(_EmbeddedImages):
    """1,797 handwritten digits of 8x8 (Alpaydin and Kaynak 1998), grey levels 0 to 16."""

    _shape = (8, 8, 1)


class EmbeddedMnist(_EmbeddedImages):
    """5,000 of the MNIST digits (LeCun et al. 1998) of 28x28, grey levels 0 to 255."""

    _shape = (28, 28, 1)


BUILDERS = {builder.name: builder for builder in (EmbeddedText, EmbeddedDigits, EmbeddedMnist)}
