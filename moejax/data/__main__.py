"""Prepares embedded data sets and shows what they hold: `python -m moejax.data [--name=embedded_text]`."""

import argparse
import sys
import time
from collections import Counter

from rich.console import Console
from rich.table import Table

from moejax.core.errors import ConfigError, nearest
from moejax.core.text import tell
from moejax.data import storage
from moejax.data.catalog import DATASETS, TextDataset
from moejax.data.config import parse


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0, or 2 after a usage error told in one line."""
    embedded = [name for name, dataset in DATASETS.items() if dataset.embedded]
    parser = argparse.ArgumentParser(prog="python -m moejax.data", description=__doc__)
    parser.add_argument("--name", help=f"one of {', '.join(embedded)}; all of them if left out")
    name = parser.parse_args(arguments).name
    console = Console()
    try:
        if name is not None and name not in DATASETS:
            raise ConfigError(f"unknown data set '{name}' in --name{nearest(name, DATASETS)}")
        for each in [name] if name else embedded:
            start = time.perf_counter()
            builder = storage.open_builder(parse({"name": each, "batch_size": 1}))
            seconds = time.perf_counter() - start
            console.print(_table(each, builder))
            console.print(f"Ready in {seconds:.1f} s, in {builder.data_dir}\n", highlight=False, soft_wrap=True)
    except ConfigError as error:
        tell(str(error))
        return 2
    choice = name or embedded[0]
    console.print(f"Use it with config.data.name = '{choice}'", highlight=False)
    return 0


def _table(name: str, builder: object) -> Table:
    """Examples and bytes of each split, and of each domain of a text."""
    dataset = DATASETS[name.replace(":", "/").split("/")[0]]
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
