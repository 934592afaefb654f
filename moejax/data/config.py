"""What `config.data` may say, checked before anything is read."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from moejax.core.errors import ConfigError, nearest
from moejax.core.fields import Count, In, Positive, Whole, check, checked, fits, short
from moejax.data.catalog import DATASETS, ImageDataset, TextDataset, base_of

MOST = 2**24  # rows of a batch, or tokens of a row: a thousand times what anybody trains with


@checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The keys of `config.data`.

    Attributes:
      name: a key of `DATASETS`; a TFDS config or version may follow, as in `wikipedia/20230601.de` or `c4/en:3.0.1`.
      batch_size: rows or images of one step over all hosts; a host's share is `batch_size / shard_count`.
      path: of `text_files` and `image_files`, a folder, a pattern such as `/data/*.txt`, or a file (`moejax.data.builders.files` says how
        it is read and divided); of `tfds_text` and `tfds_images`, the folder of a data set that TFDS prepared. Others have none.
      data_dir: folder of prepared TFDS data sets; TFDS's own default if unset. Embedded data sets ignore it.
      shuffle: a new order every epoch in endless training; off, the fixed order of evaluation.
      prefetch: batches that a thread prepares ahead.
      workers: processes that prepare batches; 0 is right unless decoding images is the bottleneck.
    """

    name: str
    batch_size: Annotated[int, In(1, MOST)]
    path: str | None = None
    data_dir: str | None = None
    shuffle: bool = True
    prefetch: Count = 4
    workers: Whole = 0

    @property
    def base(self) -> str:
        """The name without TFDS config and version."""
        return base_of(self.name)


@checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig(DataConfig):
    """The keys of `config.data` for text.

    Attributes:
      seq_len: tokens of a row.
      domains: the domains to read, all if unset.
      mixture: domain -> weight, the share of rows of each domain in endless training; by size if unset.
      packing: fill rows with several short documents; off, a row holds one window of one document.
      tokenizer: `bytes` (vocabulary 256, no special tokens), the path of a `tokenizers` JSON file, or a published model
        (`smollm2-135m`, a folder or a GGUF file), whose own it is.
      streaming: cut and pack documents while reading, rather than hold the tokens of a split in memory. If unset, corpora of
        over 256 MB are streamed.
      column: what holds the text, of records in `text_files` and of `tfds_text`; other corpora know.
    """

    gives: ClassVar[tuple[str, ...]] = ("tokens", "targets", "segments", "positions", "valid", "domain")

    seq_len: Annotated[int, In(2, MOST)] = 256
    domains: tuple[str, ...] | None = None
    mixture: tuple[tuple[str, Positive], ...] | None = None
    packing: bool = True
    tokenizer: str = "bytes"
    streaming: bool | None = None
    column: str = "text"


@checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageConfig(DataConfig):
    """The keys of `config.data` for images.

    Attributes:
      image_size: height and width; other images are resized and their centre is cropped. Needed where sizes differ.
      shift: in endless training, images move by up to this many pixels each way; zeros come in.
      flip: in endless training, every second image is mirrored.
    """

    gives: ClassVar[tuple[str, ...]] = ("image", "label", "valid")

    image_size: Count | None = None
    shift: Whole = 0
    flip: bool = False


def parse(config: Any) -> TextConfig | ImageConfig:
    """`config.data` as a checked dataclass.

    Raises:
      ConfigError: unknown data set, key or domain, or a value out of range.
    """
    if isinstance(config, DataConfig):
        return config
    if not hasattr(config, "items"):
        raise ConfigError(f"data={short(config)} must be a mapping of names to values")
    given = {key: value for key, value in config.items() if value is not None}
    if "name" not in given:
        raise ConfigError(f"data.name is missing; valid names: {', '.join(sorted(DATASETS))}")
    name = str(given["name"])
    base = base_of(name)
    if base not in DATASETS:
        raise ConfigError(f"unknown data set '{name}' in data.name{nearest(base, DATASETS)}")
    dataset = DATASETS[base]
    cls = TextConfig if isinstance(dataset, TextDataset) else ImageConfig
    keys = [field.name for field in dataclasses.fields(cls)]
    for key in given:
        if key not in keys:
            raise ConfigError(f"unknown key '{key}' in data (name='{name}'){nearest(key, keys)}")
    if "batch_size" not in given:
        raise ConfigError("data.batch_size is missing")
    if dataset.own and "path" not in given:
        raise ConfigError(f"data.name='{name}' needs data.path, where the data lie")
    for key in ("path", "column"):
        if key in given and not dataset.own:
            own = ", ".join(name for name, other in DATASETS.items() if other.own and isinstance(other, type(dataset)))
            raise ConfigError(f"data.{key}={short(given[key])} does not go with data.name='{name}'; it is for {own}")
    check(cls, {key: value for key, value in given.items() if key not in ("domains", "mixture")}, "data")
    if isinstance(dataset, TextDataset):
        given |= _check_domains(given, base, dataset)
    return cls(**given)


def check_shards(config: DataConfig, shard_index: int, shard_count: int) -> int:
    """Rows of one shard's batch.

    Raises:
      ConfigError: the batch cannot be divided, or there is no such shard.
    """
    if shard_count < 1 or not 0 <= shard_index < shard_count:
        raise ConfigError(f"shard_index={shard_index} is not a shard of shard_count={shard_count}")
    if config.batch_size % shard_count:
        raise ConfigError(
            f"data.batch_size={config.batch_size} is not divisible by shard_count={shard_count}; "
            f"take {config.batch_size // shard_count * shard_count or shard_count} or another multiple"
        )
    return config.batch_size // shard_count


def check_split(config: DataConfig, split: str, dataset: TextDataset | ImageDataset | None = None) -> None:
    """Refuses a split that the data of `config` have not.

    Args:
      dataset: as it was found; that of the name if None, which may have splits that data of one's own lack.

    Raises:
      ConfigError: naming those that there are.
    """
    dataset = dataset or DATASETS[config.base]
    if split not in dataset.splits:
        raise ConfigError(f"'{config.base}' in data.name has no split '{split}'{nearest(split, dataset.splits)}")


def _check_domains(given: Mapping[str, Any], base: str, dataset: TextDataset) -> dict[str, Any]:
    valid = dataset.domains or (base,)
    domains = given.get("domains", valid)
    if isinstance(domains, str):
        raise ConfigError(f"data.domains='{domains}' must be a tuple of names, such as ('{domains}',)")
    if not isinstance(domains, tuple | list) or not all(isinstance(domain, str) for domain in domains):
        raise ConfigError(f"data.domains={short(domains)} must be a tuple of names, such as ('{valid[0]}',)")
    domains = tuple(domains)
    for domain in domains:
        if domain not in valid:
            rest = (
                f"{nearest(domain, valid)}; data.domains=None reads all"
                if len(valid) > 1
                else "; it has none, so set data.domains to None"
            )
            raise ConfigError(f"unknown domain '{domain}' in data.domains of '{base}'{rest}")
    if not domains or len(set(domains)) != len(domains):
        raise ConfigError(f"data.domains={domains} must name each domain once; valid names: {', '.join(valid)}")
    if "mixture" not in given:
        return {"domains": domains}
    mixture = given["mixture"]
    if not hasattr(mixture, "items"):
        raise ConfigError(f"data.mixture={mixture!r} must be a mapping of domain to weight")
    for domain, weight in mixture.items():
        if domain not in domains:
            raise ConfigError(f"unknown domain '{domain}' in data.mixture{nearest(domain, domains)}")
        if not fits(weight, Positive):
            raise ConfigError(
                f"data.mixture.{domain}={short(weight)} must be a number above 0; leave the domain out of data.domains instead"
            )
    missing = [domain for domain in domains if domain not in mixture]
    if missing:
        raise ConfigError(f"data.mixture has no weight for '{missing[0]}'; add one or leave it out of data.domains")
    if given.get("streaming"):
        raise ConfigError("data.mixture needs data.streaming=False, because streamed documents come in the order of the corpus")
    return {"domains": domains, "mixture": tuple((domain, float(mixture[domain])) for domain in domains)}
