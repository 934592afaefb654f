"""The data sets by name: which kind each is, which of its features are used, and what its splits are called in TFDS.

Names with `own` are for data of one's own, which lie at `data.path`; see `moejax.data.own`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from moejax.data.builders.sources import TEXT_DOMAINS


@dataclass(frozen=True)
class TextDataset:
    """A corpus of documents.

    Attributes:
      text: the feature that holds a document's text.
      domains: names of the domains, in the order of the `domain` feature; a corpus without that feature is one domain.
      splits: our split names -> TFDS split expressions.
      version: default TFDS config, such as the `en` of `c4/en`.
      embedded: made from installed packages by `moejax.data`, rather than prepared by the user with TFDS.
      own: whose data lie at `data.path`: `files`, or a folder that `tfds` prepared. Which splits there are is seen there.
    """

    text: str = "text"
    domains: tuple[str, ...] = ()
    splits: Mapping[str, str] = field(default_factory=lambda: _plain("train", "validation", "test"))
    version: str = ""
    embedded: bool = False
    own: Literal["", "files", "tfds"] = ""


@dataclass(frozen=True)
class ImageDataset:
    """Labelled images.

    Attributes:
      white: the grey level that becomes 1.0.
      splits, version, embedded, own: as in `TextDataset`.
    """

    image: str = "image"
    label: str = "label"
    white: float = 255.0
    splits: Mapping[str, str] = field(default_factory=lambda: held_out(2, test="test"))
    version: str = ""
    embedded: bool = False
    own: Literal["", "files", "tfds"] = ""


def _plain(*names: str) -> dict[str, str]:
    return {name: name for name in names}


def held_out(percent: int, **others: str) -> dict[str, str]:
    """Splits of a data set that has no validation split: the last `percent` of its training data, which then does not train."""
    cut = 100 - percent
    return {"train": f"train[:{cut}%]", "validation": f"train[{cut}%:]", **others}


DATASETS: Mapping[str, TextDataset | ImageDataset] = {
    # From installed packages.
    "embedded_text": TextDataset(domains=TEXT_DOMAINS, embedded=True),
    "embedded_digits": ImageDataset(white=16.0, splits=_plain("train", "validation", "test"), embedded=True),
    "embedded_mnist": ImageDataset(splits=_plain("train", "validation", "test"), embedded=True),
    # One's own.
    "text_files": TextDataset(own="files"),
    "image_files": ImageDataset(splits=_plain("train", "validation", "test"), own="files"),
    "tfds_text": TextDataset(own="tfds"),
    "tfds_images": ImageDataset(splits=_plain("train", "validation", "test"), own="tfds"),
    # Prepared by the user.
    "c4": TextDataset(splits=_plain("train", "validation"), version="en"),
    "lm1b": TextDataset(splits=held_out(1, test="test")),
    "pg19": TextDataset(text="book_text"),
    "tiny_shakespeare": TextDataset(),
    "wiki40b": TextDataset(version="en"),
    "wikipedia": TextDataset(splits={"train": "train[:99%]", "validation": "train[99%:]"}, version="20230601.en"),
    "cifar10": ImageDataset(),
    "cifar100": ImageDataset(),
    "fashion_mnist": ImageDataset(),
    # The labels of its test split are secret, so the field tests on `validation`.
    "imagenet2012": ImageDataset(splits=held_out(1, test="validation")),
    "kmnist": ImageDataset(),
    "mnist": ImageDataset(),
    "svhn_cropped": ImageDataset(),
}


def base_of(name: str) -> str:
    """A data set's name without TFDS config and version: `c4` of `c4/en:3.0.1`."""
    return name.replace(":", "/").split("/")[0]


def is_own(name: Any) -> bool:
    """Whether a data set is one's own, at a path."""
    return isinstance(name, str) and base_of(name) in DATASETS and bool(DATASETS[base_of(name)].own)
