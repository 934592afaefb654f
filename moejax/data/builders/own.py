"""TFDS builders that write one's own files down as array_record files, with what `files` finds in them."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from moejax.data.builders import files
from moejax.data.builders.files import Found
from moejax.data.pixels import resize


class TextFiles(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Documents from files, one example a document."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, found: Found, column: str, **settings: Any):
        self._found, self._column = found, column
        self._division = files.text_splits(found, column)
        super().__init__(**settings)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "source": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, description=self.__doc__, features=features)

    def _split_generators(self, dl_manager: Any) -> Mapping[str, Iterator[tuple[str, dict[str, Any]]]]:
        del dl_manager
        return {split: self._generate_examples(split) for split in files.SPLITS if split in self._division.values()}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        written = set()
        for file, text in files.documents(self._found, self._column):
            name = files.name_of(text)
            if self._division[name] == split and name not in written:
                written.add(name)
                yield name, {"text": text, "source": self._found.name(file)}


class ImageFiles(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Images from files, one example an image; its class is the name of its folder."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, found: Found, size: int | None, **settings: Any):
        self._found, self._classes = found, files.classes(found)
        self._shape = files.image_format(found, size)
        self._division = files.image_splits(found)
        super().__init__(**settings)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Tensor(shape=self._shape, dtype=np.uint8),
                "label": tfds.features.ClassLabel(names=sorted(set(self._classes.values()))),
                "source": tfds.features.Text(),
            }
        )
        return tfds.core.DatasetInfo(builder=self, description=self.__doc__, features=features)

    def _split_generators(self, dl_manager: Any) -> Mapping[str, Iterator[tuple[str, dict[str, Any]]]]:
        del dl_manager
        return {split: self._generate_examples(split) for split in files.SPLITS if split in self._division.values()}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for file in self._found.files:
            if self._division[file] == split:
                name = self._found.name(file)
                yield name, {"image": self._pixels(file), "label": self._classes[file], "source": name}

    def _pixels(self, file: Path) -> np.ndarray:
        height, width, channels = self._shape
        image = files.pixels(file, channels)
        return image if image.shape == self._shape else resize(image, height)
