"""The type checker that the tests install on the library: beartype on functions and methods.

Constructors are left out: wrong configuration is the business of `ConfigError`, and Flax modules inherit fields that beartype
cannot check.
"""

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

_typed = beartype(conf=BeartypeConf(is_pep484_tower=True))  # a whole number is a float, as Python's typing has it


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    return function if getattr(function, "__name__", "") == "__init__" else _typed(function)
