"""What a field may hold is said where the field is: its type by its annotation, its range beside that.

    @checked
    @dataclasses.dataclass(frozen=True)
    class TopP:
        p: Annotated[float, In(above=0, below=1)] = 0.4
        max_experts: Count | None = None

    TopP(p=1.5)        # ConfigError: p=1.5 must be a number above 0 and below 1

Every registered kind is checked so (`moejax.core.registry`), and every section of settings, however it is made. Numbers are stricter than
Python's: true is none, and neither infinity nor NaN is one. What a rule needs to know of two fields at once is the class's own affair.
"""

import dataclasses
import functools
import inspect
import math
import numbers
import types
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, Union, get_args, get_origin

from moejax.core.errors import ConfigError, nearest

# Fields that Flax adds to every module's dataclass; nobody configures them.
FLAX_FIELDS = frozenset({"parent", "name"})

Class = TypeVar("Class", bound=type)


@dataclasses.dataclass(frozen=True)
class In:
    """A range, beside a number's type: `In(0, 1)` with both ends, `In(above=0)` and `In(0, below=1)` without one."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def __contains__(self, value: Any) -> bool:
        return (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        if self.least is not None and self.most is not None:
            return f"between {self.least} and {self.most}"
        words = {"of at least": self.least, "above": self.above, "of at most": self.most, "below": self.below}
        return " and ".join(f"{word} {end}" for word, end in words.items() if end is not None)


@dataclasses.dataclass(frozen=True)
class Floating:
    """Whatever JAX takes for a floating-point type."""

    def __contains__(self, value: Any) -> bool:
        import jax.numpy as jnp

        try:
            return jnp.issubdtype(jnp.dtype(value), jnp.floating) and value is not None
        except (TypeError, ValueError):
            return False

    def __str__(self) -> str:
        return "floating-point type, such as 'float32' or 'bfloat16'"


Count: TypeAlias = Annotated[int, In(1)]
Whole: TypeAlias = Annotated[int, In(0)]
Seed: TypeAlias = Annotated[int, In(0, 2**32 - 1)]  # keys have 32 bits: 2**32 would start what 0 starts
# Of what is written into a program again and again: with a slip of the keyboard it would be traced for ever.
Few: TypeAlias = Annotated[int, In(1, 10_000)]
Positive: TypeAlias = Annotated[float, In(above=0)]
NonNegative: TypeAlias = Annotated[float, In(0)]
Fraction: TypeAlias = Annotated[float, In(0, 1)]
# Of what is dropped or kept from step to step: all of it would leave nothing to come.
Rate: TypeAlias = Annotated[float, In(0, below=1)]
DType: TypeAlias = Annotated[Any, Floating()]


def checked(cls: Class, also: Callable[[Mapping[str, Any]], None] | None = None) -> Class:
    """Class decorator: whoever makes one, its arguments are checked against the annotations before anything else looks at them.

    Args:
      also: looks at the arguments, by name of their field, before their types are.

    Raises (when one is made):
      ConfigError: an argument that the class does not have, or a value that its field may not hold.
    """
    made = cls.__init__
    if getattr(made, "checks", False):
        return cls
    signature = inspect.signature(made)

    @functools.wraps(made)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in kwargs:
            if name not in signature.parameters:
                raise ConfigError(f"unknown key '{name}' in {type(self).__name__}{nearest(name, hints_of(type(self)))}")
        try:
            given = signature.bind(self, *args, **kwargs).arguments
        except TypeError as error:
            raise ConfigError(f"{type(self).__name__}: {error}") from None
        if also is not None:
            also(given)
        check(type(self), given)
        made(self, *args, **kwargs)

    init.checks = True
    cls.__init__ = init
    return cls


def check(cls: type, values: Mapping[str, Any], where: str = "") -> None:
    """Raises ConfigError for the first of the `values`, by name of a field of `cls`, that its field may not hold; `where` is their place."""
    hints = hints_of(cls)
    for name, value in values.items():
        if name in hints:
            check_value(value, hints[name], f"{where}.{name}" if where else name)


def check_value(value: Any, hint: Any, place: str) -> None:
    """Raises ConfigError if a value is not what an annotation says: `check_value(seed, Seed, "seed")`."""
    if not fits(value, hint):
        raise ConfigError(place + _refused(value, hint))


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is what an annotation says, all items of a collection included."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return fits(value, args[0]) and all(value in rule for rule in args[1:] if isinstance(rule, In | Floating))
    if origin in (Union, types.UnionType):
        return any(fits(value, option) for option in args)
    if hint is int:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if isinstance(origin, type) and issubclass(origin, Collection) and args:
        return isinstance(value, origin) and _items_fit(value, origin, args)
    # The rest is beartype's. It looks at one item of a collection, drawn at random, which is why collections are not.
    from beartype.door import is_bearable

    return is_bearable(value, hint)


@functools.cache
def hints_of(cls: type) -> dict[str, Any]:
    """Field -> annotation of a dataclass, or a Flax module: what a config may say."""
    fields = [field for field in dataclasses.fields(cls) if field.init and field.name not in FLAX_FIELDS]
    if any(isinstance(field.type, str) for field in fields):
        known = typing.get_type_hints(cls, include_extras=True)
        return {field.name: known[field.name] for field in fields}
    return {field.name: field.type for field in fields}


def described(hint: Any) -> str:
    """An annotation in words."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        rules = [str(rule) for rule in args[1:] if isinstance(rule, In | Floating)]
        return " ".join([described(args[0]), *rules])
    if origin in (Union, types.UnionType):
        return ", or ".join(map(described, args))
    if origin is Literal:
        return " or ".join(map(repr, args))
    if origin is Callable or hint is Callable:
        return "a function"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"a mapping whose values are each {described(args[1])}"
    if isinstance(origin, type) and args:
        number = f" {len(args)}" if Ellipsis not in args and origin is tuple else ""
        return f"a {origin.__name__} of{number} items, each {described(args[0])}"
    words = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", types.NoneType: "None", Any: "a"}
    name = str(getattr(hint, "__name__", hint))
    return words.get(hint) or f"{'an' if name[:1] in 'AEIOU' else 'a'} {name}"


def short(value: Any) -> str:
    """A value in an error: on one line, and not all of it where it is long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def _items_fit(value: Any, origin: type, args: tuple[Any, ...]) -> bool:
    if issubclass(origin, Mapping):
        return all(fits(key, args[0]) and fits(item, args[1]) for key, item in value.items())
    if origin is tuple and Ellipsis not in args:
        return len(value) == len(args) and all(map(fits, value, args))
    return all(fits(item, args[0]) for item in value)


def _refused(value: Any, hint: Any) -> str:
    """What is wrong with it, to follow the field's name."""
    names = _names(hint)
    if isinstance(value, str) and names:
        return f"='{value}' is unknown{nearest(value, names)}"
    one = next((get_args(option)[0] for option in (hint, *get_args(hint)) if get_origin(option) is tuple), None)
    fix = f"; write ({short(value)},)" if one is not None and fits(value, one) else ""
    return f"={short(value)} must be {described(hint)}{fix}"


def _names(hint: Any) -> tuple[str, ...]:
    """The names that a field takes, if it takes names and nothing else."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    options = [option for option in options if option is not types.NoneType]
    if not all(get_origin(option) is Literal for option in options):
        return ()
    return tuple(name for option in options for name in get_args(option) if isinstance(name, str))
