"""The type checker that the tests install on the library: beartype on functions and methods.

Constructors are left out: wrong configuration is the business of `ConfigError`, and Flax modules inherit fields that beartype
cannot check.
"""

from collections.abc import Callable
from typing import Any

from beartype import beartype


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    return function if getattr(function, "__name__", "") == "__init__" else beartype(function)
