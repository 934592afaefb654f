"""Paths of parameters, such as 'stack/repeats/1_moe/ffn/bank/w_in', and patterns that stand for several."""

import difflib
import fnmatch
from collections.abc import Collection, Iterable

from moejax.core.errors import ConfigError


def matches(path: str, pattern: str) -> bool:
    """Whether a pattern stands for a path: it fits the path itself, or that of something around it.

    `*` is any text, slashes included. So 'head' is 'head' and 'head/kernel', '*/norm' is all in anything called norm, and
    '*/bank/w_*' are the matrices of banks.
    """
    parts = path.split("/")
    return any(fnmatch.fnmatchcase("/".join(parts[:i]), pattern) for i in range(len(parts), 0, -1))


def find(pattern: str, paths: Iterable[str], where: str) -> list[str]:
    """The paths that a pattern stands for.

    Raises:
      ConfigError: there are none; names `where` the pattern is written, and the nearest paths.
    """
    paths = list(paths)
    found = [path for path in paths if matches(path, pattern)]
    if not found:
        raise ConfigError(f"'{pattern}' in {where} matches no parameter; {nearest_paths(pattern, paths)}")
    return found


def nearest_paths(pattern: str, paths: Collection[str], count: int = 3) -> str:
    """The paths that look most like a pattern, as a clause of an error."""
    if not paths:
        return "there are no parameters"
    wanted = pattern.replace("*", "").strip("/")

    def likeness(path: str) -> float:
        # Patterns mostly end as the paths do, and leave out how they begin.
        return max(
            difflib.SequenceMatcher(None, wanted, piece).ratio() for piece in {path, path[-len(wanted) - 4 :], *path.split("/")}
        )

    close = sorted(sorted(paths), key=likeness, reverse=True)[:count]
    return f"the nearest are {', '.join(close)}"


def listed(names: Collection[str], count: int = 4) -> str:
    """Some of many names, and how many there are more."""
    names = list(names)
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
