"""Prepares data sets and shows what they hold.

python -m moejax.data                                             # the embedded ones
python -m moejax.data --name=text_files --path='/data/*.txt'      # one's own: text_files, image_files, tfds_text, tfds_images
"""

import argparse
import sys
import time
from collections import Counter
from typing import Any

from rich.console import Console
from rich.table import Table

from moejax.core.errors import ConfigError, nearest
from moejax.core.text import tell
from moejax.data import storage
from moejax.data.catalog import DATASETS, ImageDataset, TextDataset, base_of
from moejax.data.config import parse


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0, or 2 after a usage error told in one line."""
    embedded = [name for name, dataset in DATASETS.items() if dataset.embedded]
    own = [name for name, dataset in DATASETS.items() if dataset.own]
    parser = argparse.ArgumentParser(
        prog="python -m moejax.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--name", help=f"one of {', '.join(embedded)}, all of them if left out; with --path, of {', '.join(own)}"
    )
    parser.add_argument("--path", help="where data of one's own lie: a folder, a pattern such as '/data/*.txt', or a file")
    parser.add_argument("--column", help="what holds the text of a record; 'text' if left out")
    parser.add_argument("--image_size", type=int, help="height and width of images that differ in size")
    given = {key: value for key, value in vars(parser.parse_args(arguments)).items() if value is not None}
    name = given.pop("name", None)
    console = Console()
    try:
        if name is not None and base_of(name) not in DATASETS:
            raise ConfigError(f"unknown data set '{name}' in --name{nearest(name, DATASETS)}")
        if given and name is None:
            raise ConfigError(f"--{next(iter(given))} needs --name, one of {', '.join(own)}")
        for each in [name] if name else embedded:
            start = time.perf_counter()
            config = parse({"name": each, "batch_size": 1, **given})
            builder, dataset = storage.open_dataset(config)
            seconds = time.perf_counter() - start
            console.print(_table(each, builder, dataset))
            console.print(f"Ready in {seconds:.1f} s, in {builder.data_dir}\n", highlight=False, soft_wrap=True)
    except ConfigError as error:
        tell(str(error))
        return 2
    choice = name or embedded[0]
    also = "".join(f", config.data.{key} = {value!r}" for key, value in given.items())
    console.print(f"Use it with config.data.name = '{choice}'{also}", highlight=False, soft_wrap=True)
    return 0


def _table(name: str, builder: Any, dataset: TextDataset | ImageDataset) -> Table:
    """Examples and bytes of each split, and of each domain of a text."""
    is_text = isinstance(dataset, TextDataset)
    groups = (dataset.domains or (name,)) if is_text else ("images",)
    table = Table(title=name)
    table.add_column("domain" if is_text else "")
    for split in dataset.splits:
        table.add_column(split, justify="right")
    totals = {}
    for split, expression in dataset.splits.items():
        examples = storage.open_split(builder, expression, name)
        # Only small sets are counted domain by domain: that reads everything.
        if is_text and storage.fits_in_memory(builder):
            documents, size = Counter(), Counter()
            for i in range(len(examples)):
                example = examples[i]
                domain = groups[int(example["domain"])] if len(groups) > 1 else groups[0]
                documents[domain] += 1
                size[domain] += len(example[dataset.text])
            totals[split] = {group: f"{documents[group]:,} docs, {_bytes(size[group])}" for group in groups}
        else:
            total = f"{len(examples):,}, {_bytes(builder.info.splits[expression].num_bytes)}"
            totals[split] = dict.fromkeys(groups, total)
    for group in groups:
        table.add_row(group, *(totals[split][group] for split in dataset.splits))
    return table


def _bytes(count: int) -> str:
    return f"{count / 1e6:,.2f} MB" if count >= 1e6 else f"{count / 1e3:,.0f} kB"


if __name__ == "__main__":
    sys.exit(main())
