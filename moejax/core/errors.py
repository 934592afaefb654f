"""Errors that a user can act on: they name the value, the place and the fix."""

import difflib
from collections.abc import Collection, Iterable
from typing import Any


class ConfigError(ValueError):
    """A configuration cannot be used. The command line prints its message as one line and exits with status 2."""


def nearest(name: Any, options: Iterable[Any]) -> str:
    """A hint to append to an error about an unknown `name`: the closest of `options`, or all of them."""
    options = sorted(map(str, options))
    close = difflib.get_close_matches(str(name), options, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; valid names: {', '.join(options) or '(none)'}"


def check_choice(name: str, value: Any, options: Collection[Any]) -> None:
    """Raises ConfigError if the field `name` has a `value` that is none of its `options`."""
    if value not in options:
        raise ConfigError(f"{name}='{value}' is unknown; valid names: {', '.join(map(str, options))}")
