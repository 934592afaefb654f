"""Plain text, tables and paths on the terminal: nothing that is printed can do more than be read, see `moejax.core.text`."""

import contextlib
import errno
import importlib.util
import logging
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table as RichTable
from rich.text import Text

from moejax.core.text import printable, tell

if TYPE_CHECKING:
    from experiments.tables import Table

# Errors of the system that no change of the program would mend.
MACHINE = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOENT, errno.ENOTDIR, errno.EISDIR,
    errno.EEXIST, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ENAMETOOLONG, errno.ELOOP, errno.ENODEV, errno.ENXIO,
)  # fmt: skip
GAP = 2  # columns between those of a table
SHORT = 18  # characters up to which a cell stays on one line
PLAIN_WIDTH = 160  # columns where no terminal says how many it has


def make_console(quiet: bool = False) -> Console:
    """Standard output, wide enough for tables in a log; or nowhere."""
    return PlainConsole(quiet=quiet) if sys.stdout.isatty() else PlainConsole(width=PLAIN_WIDTH, quiet=quiet)


class PlainConsole(Console):
    """A console whose own escape sequences are the only ones: those in names, notes and errors are written out."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def told(error: BaseException) -> str:
    """An error as one line."""
    return " ".join(str(error).split())


def trouble(error: BaseException) -> str:
    """In one line, what of the machine's an error is about: its disk, its permissions. Empty if it is about something else.

    What writes in the background wraps such errors in others, so all that led to this one are looked at.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if type(error).__name__ == "SaveFailed":  # of a module that is not imported for this
            return told(error)
        if isinstance(error, OSError) and error.errno in MACHINE:
            return " ".join(filter(None, (f"{os.strerror(error.errno)}:", str(error.filename or "")))).removesuffix(":")
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
            if os.strerror(number) in str(error):
                return os.strerror(number)
        error = error.__cause__ or error.__context__
    return ""


@contextlib.contextmanager
def one_line_each() -> Iterator[None]:
    """Warnings are one line, and so is what goes wrong in a thread for want of disk; the thread that waits for it says the rest."""
    old_format, old_hook = warnings.formatwarning, threading.excepthook

    def format_warning(message: Any, category: type[Warning], *place: Any, **more: Any) -> str:
        if not issubclass(category, UserWarning):
            return printable(old_format(message, category, *place, **more))
        return f"warning: {printable(told(message))}\n"

    def hook(args: Any) -> None:
        if args.exc_value is not None and trouble(args.exc_value):
            return
        lines = traceback.format_exception(args.exc_type, args.exc_value, args.exc_traceback)
        tell(f"in thread {args.thread.name if args.thread else '?'}:\n{''.join(lines)}".rstrip())

    def is_news(record: logging.LogRecord) -> bool:
        return not (record.exc_info and record.exc_info[1] and trouble(record.exc_info[1]))

    # What Orbax logs with a traceback it also raises.
    logger = logging.getLogger("absl")
    logger.addFilter(is_news)
    warnings.formatwarning, threading.excepthook = format_warning, hook
    try:
        yield
    finally:
        warnings.formatwarning, threading.excepthook = old_format, old_hook
        logger.removeFilter(is_news)


def say(console: Console, text: str) -> None:
    """One line as it is: no markup, no colours, no wrapping that would break a path."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def show(console: Console, table: "Table") -> None:
    """A table; a row's style colours its last cell (the verdict), 'dim' the whole row.

    No word is broken while there is room for words: where the terminal is too narrow for all columns, they follow each other in several
    tables, each with the first column.
    """
    for number, (columns, widths) in enumerate(_parts(table, console.width)):
        title = table.title if not number else ""
        shown = RichTable(
            title=title or None, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, GAP, 0, 0)
        )
        for i, width in zip(columns, widths, strict=True):
            shown.add_column(table.columns[i], overflow="fold", width=width)
        for row, style in zip(table.rows, table.styles or [""] * len(table.rows), strict=True):
            cells = [Text(row[i], style=style if i == len(row) - 1 else "") for i in columns]
            shown.add_row(*cells, style="dim" if style == "dim" else "")
        console.print(shown)
        console.print()
    for note in table.notes:
        console.print(Text(note, style="dim"))
    if table.notes:
        console.print()


def curves(folder: Path) -> str:
    """The command that shows the curves in a folder, if there is one here that does; ''."""
    return f"tensorboard --logdir={short(folder)}" if importlib.util.find_spec("tensorboard") else ""


def _parts(table: "Table", room: int) -> list[tuple[list[int], list[int]]]:
    """Which columns stand side by side, and how wide they are, in as few tables as have room for the longest word of each column."""
    texts = [[table.columns[i], *(row[i] for row in table.rows)] for i in range(len(table.columns))]
    full = [max(map(cell_len, column)) for column in texts]
    least = [min(max(map(_unbroken, column)), max(room // 2 - GAP, 1)) for column in texts]
    parts: list[list[int]] = [[0]]
    for i in range(1, len(texts)):
        if sum(least[j] + GAP for j in [*parts[-1], i]) > room and len(parts[-1]) > 1:
            parts.append([0])
        parts[-1].append(i)
    found = []
    for part in parts:
        widths = {i: full[i] for i in part}
        while sum(widths.values()) + GAP * len(part) > room:
            widest = max(part, key=lambda i: widths[i] - least[i])
            if widths[widest] <= least[widest]:
                break
            widths[widest] -= 1
        found.append((part, [max(width, 1) for width in widths.values()]))
    return found


def _unbroken(text: str) -> int:
    """How wide what must not be broken is: a short cell, such as a number with its spread, or the longest word of a sentence."""
    return cell_len(text) if cell_len(text) <= SHORT else max(map(cell_len, text.split()), default=0)


def short(path: Path) -> str:
    """The path from here where it lies below, else the whole of it."""
    absolute = Path(path).absolute()
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(absolute)
