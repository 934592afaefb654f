"""Errors that a user can act on: they name the value, the place and the fix."""

import difflib
from collections.abc import Collection, Iterable
from typing import Any, SupportsIndex


class ConfigError(ValueError):
    """A configuration cannot be used. The command line prints its message as one line and exits with status 2."""


def nearest(name: Any, options: Iterable[Any]) -> str:
    """A hint to append to an error about an unknown `name`: the closest of `options`, or all of them."""
    options = sorted(map(str, options))
    close = difflib.get_close_matches(str(name), options, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; valid names: {', '.join(options) or '(none)'}"


def check_seed(name: str, value: Any) -> None:
    """Refuses what is no seed: JAX's keys have 32 bits, and would take 2**32 for 0, and -1 for 2**32 - 1.

    Raises:
      ConfigError: names the value.
    """
    if isinstance(value, bool) or not isinstance(value, SupportsIndex) or not 0 <= value.__index__() < 2**32:
        raise ConfigError(f"{name}={value!r} must be a whole number from 0 to {2**32 - 1}")


def check_choice(name: str, value: Any, options: Collection[Any]) -> None:
    """Raises ConfigError if the field `name` has a `value` that is none of its `options`."""
    if value not in options:
        raise ConfigError(f"{name}='{value}' is unknown; valid names: {', '.join(map(str, options))}")
