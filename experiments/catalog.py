"""The list of methods: a row for each paper of `catalog.toml`, with what exists of it, found by the files' names.

A method is added by new files alone: its study declares what implements it, its tests are called after it.

python -m experiments.catalog --count     the line that the README quotes
"""

import ast
import importlib
import re
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import record
from experiments.study import ROOT, study_files
from moejax.core.errors import ConfigError, nearest

FILE = ROOT / "catalog.toml"
TIERS = ("core", "adjacent", "peripheral")


@dataclass(frozen=True)
class Row:
    """One paper.

    Attributes:
      implements: dotted names that implement it, as its study declares them; empty while nobody has.
      tests: test files that check what is special to it, from the repository's root.
      study: its study file, from the repository's root; empty if there is none.
    """

    slug: str
    title: str
    arxiv: str
    year: int
    tier: str
    family: str
    implements: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()
    study: str = ""

    @property
    def status(self) -> str:
        """How far the method has come: 'study', 'implemented' or 'card'."""
        return "study" if self.study else "implemented" if self.implements else "card"


def load(file: Path = FILE) -> dict[str, Row]:
    """Slug -> row, in the file's order, with what there is of each method. Imports no study.

    Raises:
      ConfigError: an unknown or missing field, a value of the wrong type, a slug twice, a study that does not say what it implements.
    """
    rows: dict[str, Row] = {}
    fields = {name: field for name, field in Row.__dataclass_fields__.items() if name not in ("implements", "tests", "study")}
    studies, tests = study_files(), _test_files()
    for i, given in enumerate(tomllib.loads(file.read_text())["method"]):
        where = f"row {i} ('{given.get('slug')}') of {file.name}"
        for key in given:
            if key not in fields:
                raise ConfigError(f"unknown field '{key}' in {where}{nearest(key, fields)}")
        for key, field in fields.items():
            if not isinstance(given.get(key), field.type):
                raise ConfigError(f"{key}={given.get(key)!r} in {where} is not of type {field.type.__name__}")
        slug = given["slug"]
        if slug in rows:
            raise ConfigError(f"slug '{slug}' is in {file.name} twice")
        if given["tier"] not in TIERS:
            raise ConfigError(f"tier '{given['tier']}' in {where}{nearest(given['tier'], TIERS)}")
        study = studies.get(slug)
        rows[slug] = Row(
            **given,
            implements=_implements(study) if study else (),
            tests=tests.get(slug, ()),
            study=study.relative_to(ROOT.parent).as_posix() if study else "",
        )
    return rows


def _implements(study: Path) -> tuple[str, ...]:
    """What a study file declares as `Study(..., implements=(...))`."""
    for node in ast.walk(ast.parse(study.read_text())):
        if isinstance(node, ast.keyword) and node.arg == "implements":
            return tuple(ast.literal_eval(node.value))
    raise ConfigError(
        f"{study.parent.name}/{study.name} does not say what implements its method; give Study implements=('moejax.Name',)"
    )


def _test_files() -> dict[str, tuple[str, ...]]:
    """Slug -> its test files."""
    found: dict[str, tuple[str, ...]] = {}
    for path in sorted((ROOT.parent / "tests" / "methods").glob("*/test_*.py")):
        slug = path.stem.removeprefix("test_")
        found[slug] = (*found.get(slug, ()), path.relative_to(ROOT.parent).as_posix())
    return found


def resolve(name: str) -> Any:
    """The object that a dotted name means: `moejax.layers.ffn.moe.MoE`.

    Raises:
      ConfigError: no module or attribute of that name.
    """
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError as error:
            # A module that exists but misses a dependency is another mistake, which must not look like a wrong name.
            if error.name is None or not ".".join(parts[:cut]).startswith(error.name):
                raise
            continue
        for part in parts[cut:]:
            if not hasattr(found, part):
                raise ConfigError(f"'{name}': {found.__name__} has no '{part}'{nearest(part, dir(found))}")
            found = getattr(found, part)
        return found
    raise ConfigError(f"'{name}' is not a module of this library")


def count(rows: dict[str, Row], ledger: Path = record.LEDGER) -> str:
    """`4 of 214 methods implemented, 3 with a study, 2 judged`: the README's line."""
    judged = {entry["slug"] for entry in record.entries(ledger)} & set(rows)
    done = sum(bool(row.implements) for row in rows.values())
    studies = sum(bool(row.study) for row in rows.values())
    return f"{done} of {len(rows)} methods implemented, {studies} with a study, {len(judged)} judged"


def told_count(text: str) -> str:
    """What follows `<!-- count -->` in a text, up to the end of the sentence.

    Raises:
      ConfigError: there is no such mark.
    """
    found = re.search(r"<!-- count -->\s*([^.\n]*)", text)
    if not found:
        raise ConfigError("no '<!-- count -->' in the text; put it before the line that --count prints")
    return found.group(1).strip()


def families(rows: dict[str, Row]) -> list[str]:
    """The families there are, sorted."""
    return sorted({row.family for row in rows.values()})


def extra_studies(rows: dict[str, Row]) -> dict[str, Path]:
    """Studies that are no paper's: slug -> file."""
    return {slug: path for slug, path in study_files().items() if slug not in rows}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the count line."""
    argv = sys.argv[1:] if argv is None else argv
    if list(argv) != ["--count"]:
        print(f"error: unknown arguments {' '.join(argv) or '(none)'}; the only one is --count", file=sys.stderr)
        return 2
    print(count(load()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
