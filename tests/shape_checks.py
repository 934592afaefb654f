"""Run-time checks of types and shapes that the tests install on the library: beartype on the functions and methods of a package.

jaxtyping's import hook puts `jaxtyping.jaxtyped` on everything that a package defines; here `checked` stands in for it. It checks the
same, in less time: a function's checks are made when it is first called, once for all functions that come from one piece of code (the
loss that a train step defines is another object in every trace), and arguments are looked at once.

Constructors are left out: wrong configuration is the business of `ConfigError`, and Flax modules inherit fields that beartype
cannot check.
"""

import functools
import inspect
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jaxtyping
from beartype import BeartypeConf, beartype

_typed = beartype(conf=BeartypeConf(is_pep484_tower=True))  # a whole number is a float, as Python's typing has it
# In here a letter of a shape is one number. It has no state of its own, so that one serves all calls.
_letters = jaxtyping.jaxtyped("context")


def install(packages: Sequence[str]) -> None:
    """Checks the packages; none of them may have been imported."""
    jaxtyping.jaxtyped = lambda *, typechecker: checked
    jaxtyping.install_import_hook(packages, None)


def checked(made: Any) -> Any:
    """The function, which raises beartype's violation if it is given or gives what its annotations forbid."""
    if not isinstance(made, types.FunctionType) or made.__name__ == "__init__":
        return made
    checks: _Checks | None = None

    @functools.wraps(made)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        nonlocal checks
        if checks is None:
            checks = _checks_of(made)
        with _letters:
            checks.given(*args, **kwargs)
            return checks.gives(made(*args, **kwargs))

    return wrapper


class _Checks(NamedTuple):
    """`given(...)` takes what the function takes, `gives(value)` gives the value: both after a look at it."""

    given: Callable[..., None]
    gives: Callable[[Any], Any]


# By code: the annotations that a function of this code had, and its checks.
_known: dict[types.CodeType, tuple[dict[str, Any], _Checks]] = {}


def _checks_of(function: types.FunctionType) -> _Checks:
    annotations, checks = _known.get(function.__code__, (None, None))
    # Annotations are evaluated anew with the function, and may be others.
    if checks is None or annotations != function.__annotations__:
        checks = _make(function)
        _known[function.__code__] = function.__annotations__, checks
    return checks


def _make(function: types.FunctionType) -> _Checks:
    hints = {name: _resolved(hint, function.__globals__) for name, hint in function.__annotations__.items()}
    code = function.__code__
    stars = code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS)
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount + stars.bit_count()]
    takes_the_same = _nothing.__code__.replace(
        co_argcount=code.co_argcount,
        co_posonlyargcount=code.co_posonlyargcount,
        co_kwonlyargcount=code.co_kwonlyargcount,
        co_nlocals=len(names),
        co_varnames=names,
        co_flags=_nothing.__code__.co_flags | stars,
    )
    given = types.FunctionType(takes_the_same, function.__globals__, function.__name__, function.__defaults__)
    given.__kwdefaults__ = function.__kwdefaults__
    gives = types.FunctionType(_same.__code__, function.__globals__, function.__name__)
    for check, own in ((given, [name for name in hints if name != "return"]), (gives, ["return"])):
        check.__module__, check.__qualname__ = function.__module__, function.__qualname__
        check.__annotations__ = {name: hints[name] for name in own if name in hints}
    return _Checks(_typed(given), _typed(gives))


def _resolved(hint: Any, names: dict[str, Any]) -> Any:
    """A hint that is text as what it means; Any if that cannot be told."""
    holder = types.SimpleNamespace(__annotations__={"hint": hint})
    try:
        return typing.get_type_hints(holder, names, include_extras=True)["hint"]
    except Exception:  # also what evaluating the text raises
        return Any


def _nothing() -> None: ...


def _same(value: Any) -> Any:
    return value
