"""Errors that a user can act on: they name the value, the place and the fix."""

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A configuration cannot be used. The command line prints its message as one line and exits with status 2."""


def nearest(name: str, options: Iterable[str]) -> str:
    """A hint to append to an error about an unknown `name`: the closest of `options`, or all of them."""
    options = sorted(options)
    close = difflib.get_close_matches(str(name), options, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; valid names: {', '.join(options) or '(none)'}"
