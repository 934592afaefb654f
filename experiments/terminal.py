"""Plain text, tables and paths on the terminal."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

if TYPE_CHECKING:
    from experiments.tables import Table

PLAIN_WIDTH = 160  # columns where no terminal says how many it has


def make_console(quiet: bool = False) -> Console:
    """Standard output, wide enough for tables in a log; or nowhere."""
    return Console(quiet=quiet) if sys.stdout.isatty() else Console(width=PLAIN_WIDTH, quiet=quiet)


def say(console: Console, text: str) -> None:
    """One line as it is: no markup, no colours, no wrapping that would break a path."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def show(console: Console, table: "Table") -> None:
    """A table; a row's style colours its last cell (the verdict), 'dim' the whole row."""
    shown = RichTable(
        title=table.title or None, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    for column in table.columns:
        shown.add_column(column, overflow="fold")
    for i, row in enumerate(table.rows):
        style = table.styles[i] if table.styles else ""
        last = [Text(row[-1], style=style)]
        shown.add_row(*[Text(cell) for cell in row[:-1]], *last, style="dim" if style == "dim" else "")
    console.print(shown)
    console.print()


def short(path: Path) -> str:
    """The path from here where it lies below, else the whole of it."""
    absolute = Path(path).absolute()
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(absolute)
