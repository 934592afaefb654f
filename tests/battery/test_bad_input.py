"""Configs that somebody has broken: each is built and traced, or refused in one line, and nonsense is never taken.

Mutations of the smoke config of every study's headline arm, and of a small model around every registered kind that no study holds. How many
is said by MOEJAX_MUTATIONS; the usual run tries few, always the same.
"""

import contextlib
import copy
import os
import signal
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from experiments.battery import subjects
from experiments.battery.kinds import Kind, kinds
from moejax.aot import program_of
from moejax.core.errors import ConfigError
from moejax.train.checks import check_config
from moejax.train.settings import plain

MUTATIONS = int(os.environ.get("MOEJAX_MUTATIONS", "60"))
SECONDS = 60  # in which a broken config must be refused or built

# What no field of numbers, switches or parts takes.
NONSENSE = ("abc", [1, "a"], float("nan"), float("inf"), {"kind": ["x"]}, {1: 2})
OTHERS = ("", None, True, False, 0, -1, 3, 10**9, 0.5, -0.5, 3.7, 1e30, [], {}, {"kind": "linear"}, {"kind": None}, ["moe"])
GONE = object()

Path = tuple[str | int, ...]


class Broken(NamedTuple):
    """What was changed: where, and to what."""

    config: dict[str, Any]
    path: Path
    old: Any
    new: Any

    @property
    def nonsense(self) -> bool:
        """Whether nobody can have meant it."""
        if "over_depth" in self.path or self.path[0] == "init":
            return False
        new = self.new
        if isinstance(self.old, bool):
            unset = new is GONE or (new is None and self.path[0] == "data")
            return not unset and not isinstance(new, bool)
        if isinstance(self.old, int | float):
            return isinstance(new, str | list | bool) or new != new or new in (float("inf"), {"kind": ["x"]}, {1: 2})
        is_part = isinstance(self.old, Mapping) and "kind" in self.old
        return is_part and isinstance(new, str | bool | int | float | list)

    def __repr__(self) -> str:
        return f"{'.'.join(map(str, self.path))}: {self.old!r} -> {'gone' if self.new is GONE else repr(self.new)}"


def places(tree: Any, path: Path = ()) -> Iterator[Path]:
    """The paths of everything in a config."""
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        # The config of another run is as this one.
        yield from places(value, (*path, key)) if key != "config" else ()


def broken(config: dict[str, Any], path: Path, new: Any) -> Broken:
    config = copy.deepcopy(config)
    *outer, last = path
    node = config
    for key in outer:
        node = node[key]
    old = node[last]
    if new is GONE:
        del node[last]
    else:
        node[last] = copy.deepcopy(new)
    return Broken(config, path, old, new)


def small(subject: subjects.Subject) -> dict[str, Any]:
    """Its config with a batch that is soon traced."""
    config = plain(subject.config)
    config["data"]["batch_size"] = 2
    if "seq_len" in config["data"]:
        config["data"]["seq_len"] = 8
    return config


def trace(config: dict[str, Any]) -> None:
    """Everything that is made of a config, and the shapes of its forward pass."""
    config = ConfigDict(config)
    check_config(config)
    program_of(config).state  # noqa: B018


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    def late(*_: Any) -> None:
        raise AssertionError(f"neither built nor refused in {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def check(case: Broken) -> None:
    with in_time():
        try:
            trace(case.config)
        except ConfigError:
            return
    assert not case.nonsense, f"taken: {case!r}"


MADE: dict[str, dict[str, Any]] = {}


@st.composite
def any_broken(draw: st.DrawFn) -> tuple[str, Broken]:
    """A subject's name, and its config with one thing changed."""
    names = [f"study {name}" for name in subjects.names()] + [f"{kind.slot} {kind.name}" for kind in tried()]
    name = draw(st.sampled_from(names))
    if name not in MADE:
        what, _, which = name.partition(" ")
        MADE[name] = small(subjects.of_study(which) if what == "study" else subjects.of_kind(what, which))
    config = MADE[name]
    path = draw(st.sampled_from(list(places(config))))
    return name, broken(config, path, draw(st.sampled_from([*NONSENSE, *OTHERS, GONE])))


def tried() -> list[Kind]:
    """The kinds of which a model is made."""
    return [kind for kind in kinds() if kind.slot in subjects.PLACES]


@settings(
    max_examples=MUTATIONS,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(any_broken())
def test_a_broken_config_is_refused_in_one_line_or_it_works(case: tuple[str, Broken]) -> None:
    check(case[1])
