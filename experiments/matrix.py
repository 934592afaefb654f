"""What each method can do, found out by doing it: the battery as a table, method x property.

    python -m experiments.run --list --matrix
    python -m experiments.run --list --matrix --study=remoe     # one row, and why what it cannot do fails

A method is the headline arm of its study, shrunk; the columns are the properties of `experiments.battery`.
"""

import dataclasses
from collections.abc import Callable, Iterable

from experiments.battery import subjects
from experiments.battery.properties import PROPERTIES
from experiments.study import Study
from experiments.tables import Table
from moejax.core.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Cell:
    """What came of a try. `why` is the library's own refusal where there is one."""

    text: str
    why: str = ""


def matrix(studies: Iterable[Study], tell: Callable[[str], None] = lambda _: None) -> dict[str, dict[str, Cell]]:
    """Slug -> property -> cell, for every study; `tell` is given what is being tried. Needs eight devices, simulated or real."""
    found = {}
    for study in studies:
        tell(study.slug)
        found[study.slug] = examine(study)
    return found


def examine(study: Study) -> dict[str, Cell]:
    """The row of one study's headline arm. An error that is no refusal is raised: it is a bug."""
    subject = subjects.of_study(study.slug)

    def cell(name: str) -> Cell:
        try:
            return Cell(PROPERTIES[name](subject))
        except ConfigError as refusal:
            return Cell("no", " ".join(str(refusal).split()))

    return {name: cell(name) for name in PROPERTIES}


def table(found: dict[str, dict[str, Cell]]) -> Table:
    """The matrix as a table."""
    rows = tuple((slug, *(cells[column].text for column in PROPERTIES)) for slug, cells in found.items())
    return Table("What was tried", ("method", *PROPERTIES), rows)


def reasons(cells: dict[str, Cell]) -> list[str]:
    """Why a row's cells are 'no', in the library's words."""
    return [f"{column}: {cell.why}" for column, cell in cells.items() if cell.why]
