"""From a config's `kind` strings to classes: one registry per slot of a model, and errors with the nearest valid name.

A class registers itself where it is written, a registry knows the folders in which to look for them, and so a new file in such a
folder is all that a new kind takes. A class is then buildable from a mapping `{'kind': name, **fields}`. Its dataclass fields are the valid
keys and their annotations what each may hold (`moejax.core.fields`), so a new method needs neither parsing nor checking code:

    routers = Registry('router', 'moejax.routing.routers')

    @routers.register('linear')
    class Linear(nn.Module):
        num_experts: Count

    routers.build({'kind': 'linear'}, where='model.ffn.router', num_experts=8)
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

from moejax.core.errors import ConfigError, nearest
from moejax.core.fields import check, checked, hints_of, short
from moejax.core.folders import import_all

# What a spec tells its own parts, where they have a field of that name and do not say otherwise. Nothing else is handed down: a
# block's `dropout` is not its bank's, nor a layer's `coef` its loss's.
HANDED_DOWN = frozenset({"num_experts", "num_layers", "d_model", "dtype", "backend", "max_length", "causal", "rope_base"})
# Class -> the slots for which it is registered, anywhere; and class -> field -> the slots of what goes there.
_SLOTS_OF: dict[type, set[str]] = {}
_PARTS_OF: dict[type, dict[str, set[str]]] = {}


class Registry:
    """Maps `kind` names to classes for one slot.

    Fields that are themselves slots (a MoE's router, a block's norm) are declared in `slots`: field name -> registry. Such a
    field may be a spec, which is built recursively, or an object, which is taken as it is. `Many(registry)` is a slot of
    several items, `Given(registry, {...})` one whose context differs from its surroundings'.

    Args:
      slot: what its classes are, for errors.
      *homes: packages (with all that lies in them) and modules whose classes register here; imported when first asked for.
      role: what the parameters of its classes are, where a class does not say it itself; see `moejax.core.roles`.
    """

    def __init__(self, slot: str, *homes: str, role: str = ""):
        self.slot, self.role = slot, role
        self._homes: tuple[str, ...] = homes
        self._classes: dict[str, type] = {}
        self._slots: dict[str, dict[str, "Slot"]] = {}

    def register(self, kind: str, slots: Mapping[str, "Slot"] | None = None) -> Callable[[type], type]:
        """Class decorator: makes the class buildable as `kind`, and checks what its fields are given whoever makes one."""

        def add(cls: type) -> type:
            if kind in self._classes:
                raise ValueError(f"{self.slot} kind '{kind}' is registered twice: {self._classes[kind]} and {cls}")
            if self.role and "role" not in vars(cls):
                cls.role = self.role
            self._classes[kind] = cls
            self._slots[kind] = dict(slots or {})
            _SLOTS_OF.setdefault(cls, set()).add(self.slot)
            for name, slot in self._slots[kind].items():
                _PARTS_OF.setdefault(cls, {}).setdefault(name, set()).add(_slot_name(slot))
            return checked(cls, functools.partial(_check_parts, cls))

        return add

    def build(self, spec: Any, where: str, **context: Any) -> Any:
        """The object that `spec` describes.

        Args:
          spec: mapping with a `kind` and fields, or a ready object, which is returned unchanged.
          where: the dotted place of the spec in the user's config, for errors.
          **context: values for fields that the class has and the spec leaves out (num_experts, dtype, ...). Passed on to
            nested slots, with what the spec itself says of `HANDED_DOWN`.

        Raises:
          ConfigError: unknown kind or key, or a required field left out; names the place and the nearest valid name.
        """
        if not _is_mapping(spec):
            return self.accept(spec, where)
        given = {k: v for k, v in spec.items() if k != "kind"}
        if "kind" not in spec:
            raise ConfigError(f"{where} has no 'kind'; valid {self.slot} kinds: {', '.join(self.kinds())}")
        kind = spec["kind"]
        self._look()
        if not isinstance(kind, str) or kind not in self._classes:
            raise ConfigError(f"unknown {self.slot} kind '{kind}' in {where}.kind{nearest(kind, self._classes)}")
        cls, slots = self._classes[kind], self._slots[kind]
        fields = {field.name: field for field in dataclasses.fields(cls) if field.name in hints_of(cls)}
        for key in given:
            if key not in fields:
                raise ConfigError(f"unknown key '{key}' in {where} ({self.slot} '{kind}'){nearest(key, fields)}")
        given = {key: value if key in slots else _plain(value) for key, value in given.items()}
        check(cls, {key: value for key, value in given.items() if key not in slots}, where)
        # A slot is filled only where it is written: an outer part may use the same name for something else.
        inherited = {k: v for k, v in context.items() if k in fields and k not in given and k not in slots}
        inner = {**context, **{k: v for k, v in given.items() if k in HANDED_DOWN and k not in slots}}
        built = {}
        for key, value in given.items():
            has_parts = key in slots and value is not None
            built[key] = slots[key].build(value, f"{where}.{key}", **inner) if has_parts else value
        for name, field in fields.items():
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if required and name not in built and name not in inherited:
                raise ConfigError(f"{where} ({self.slot} '{kind}') needs '{name}'")
        try:
            return cls(**inherited, **built)
        except ConfigError as error:
            if where in str(error):
                raise
            raise ConfigError(f"{error} (in {where})") from None

    def accept(self, part: Any, where: str) -> Any:
        """A ready part, as it is.

        Raises:
          ConfigError: it can be none: plain data, or of a kind that is registered for another slot only.
        """
        if isinstance(part, _DATA):
            example = f"{{'kind': '{part if isinstance(part, str) else self.kinds()[0]}'}}"
            raise ConfigError(f"{where}={short(part)} must be a mapping such as {example}")
        _check_slot(part, where, {self.slot})
        return part

    def kinds(self) -> list[str]:
        """The registered names, sorted."""
        self._look()
        return sorted(self._classes)

    def kind_of(self, item: Any) -> str:
        """The name under which an object's class is registered."""
        for kind, cls in self._classes.items():
            if type(item) is cls:
                return kind
        raise ConfigError(f"{type(item).__name__} is not a registered {self.slot}; valid kinds: {', '.join(self.kinds())}")

    def slots(self, kind: str) -> Mapping[str, "Slot"]:
        """The fields of a kind that are slots themselves."""
        self._look()
        return self._slots[kind]

    def items(self) -> Iterator[tuple[str, type]]:
        """Pairs of name and class, sorted by name."""
        self._look()
        return iter(sorted(self._classes.items()))

    def _look(self) -> None:
        """Imports the homes, once. Those of a folder may build parts while they are imported."""
        homes, self._homes = self._homes, ()
        try:
            for home in homes:
                import_all(home)
        except BaseException:
            self._homes = homes  # a file that does not import is told each time, and not as an unknown kind the next
            raise

    def __getitem__(self, kind: str) -> type:
        self._look()
        if kind not in self._classes:
            raise ConfigError(f"unknown {self.slot} kind '{kind}'{nearest(kind, self._classes)}")
        return self._classes[kind]


@dataclasses.dataclass(frozen=True)
class Many:
    """A slot that holds several items of a registry: a mapping of kind -> fields in a config, a tuple once built.

    A mapping rather than a list, so that a single field can be overridden by name on the command line. Where two items are of
    one kind, or a name says more, the fields say the 'kind', and what leads to them is any name.
    """

    registry: Registry

    def build(self, specs: Any, where: str, **context: Any) -> tuple[Any, ...]:
        if isinstance(specs, (tuple, list)):
            return tuple(self.registry.build(s, f"{where}[{i}]", **context) for i, s in enumerate(specs))
        items = {kind: fields for kind, fields in self.named(specs, where).items() if fields is not None}
        for kind, fields in items.items():
            if not _is_mapping(fields):
                raise ConfigError(f"{where}.{kind}={short(fields)} must be a mapping of fields, or None to leave it out")
        return tuple(
            self.registry.build({"kind": kind, **fields}, f"{where}.{kind}", **context) for kind, fields in items.items()
        )

    def named(self, specs: Any, where: str) -> Any:
        """The specs by name. Raises ConfigError for what is no mapping."""
        if not _is_mapping(specs):
            raise ConfigError(f"{where}={short(specs)} must be a mapping of names to {self.registry.slot}s")
        return specs


@dataclasses.dataclass(frozen=True)
class Given:
    """A slot whose parts see `values` in their context instead of what surrounds them.

    Shared experts, say, are not as many as the routed ones beside them unless their own spec says so.
    """

    registry: "Registry | Many"
    values: Mapping[str, Any]

    def build(self, spec: Any, where: str, **context: Any) -> Any:
        return self.registry.build(spec, where, **{**context, **self.values})


Slot: TypeAlias = Registry | Many | Given

# What a config is made of: never a part.
_DATA = None | str | bytes | bool | int | float | complex | tuple | list | set | frozenset


def _is_mapping(spec: Any) -> bool:
    """Whether it is a mapping; a ConfigDict is none by its class."""
    return isinstance(spec, Mapping) or hasattr(spec, "items")


def _slot_name(slot: Slot) -> str:
    """The slot of the parts that it holds."""
    return slot.slot if isinstance(slot, Registry) else _slot_name(slot.registry)


def _check_parts(cls: type, given: Mapping[str, Any]) -> None:
    """Refuses a part in the place of another one: a router for a select rule."""
    for name, slots in _PARTS_OF.get(cls, {}).items():
        part = given.get(name)
        several = isinstance(part, tuple)
        for i, item in enumerate(part if several else (part,)):
            _check_slot(item, f"{name}[{i}]" if several else name, slots)


def _check_slot(part: Any, where: str, slots: set[str]) -> None:
    """Refuses an object whose class is registered for other slots only; of what is registered nowhere nothing is known."""
    own = _SLOTS_OF.get(type(part), slots)
    if not own & slots:
        one, other = (" or ".join(sorted(names)) for names in (own, slots))
        raise ConfigError(
            f"{where}={type(part).__name__} is registered as a kind of {one}, and what goes here is a kind of {other}"
        )


def _plain(value: Any) -> Any:
    """Config containers as hashable Python values, which Flax modules need as fields."""
    if hasattr(value, "items"):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(_plain(v) for v in value)
    return value
