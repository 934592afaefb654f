"""Configs that somebody has broken: each is built and traced, or refused in one line, and nonsense is never taken.

Mutations of the smoke config of every study's headline arm, and of a small model around every registered kind that no study holds. How many
is said by MOEJAX_MUTATIONS; the usual run tries few, always the same.
"""

import contextlib
import copy
import functools
import os
import signal
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from experiments.battery import subjects
from experiments.battery.kinds import kinds
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
        # What is said to a schedule over depth, to a source or to what counts the data's tokens, they look at when they are asked.
        if {"over_depth", "frequencies", "clusters", "successors"} & set(self.path) or self.path[0] == "init":
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


@functools.cache
def config_of(name: str) -> dict[str, Any]:
    what, _, which = name.partition(" ")
    return small(subjects.of_study(which) if what == "study" else subjects.of_kind(what, which))


def names() -> list[str]:
    """Of studies, and of the kinds of which a model is made."""
    tried = [kind for kind in kinds() if kind.slot in subjects.PLACES]
    return [*(f"study {name}" for name in subjects.names()), *(f"{kind.slot} {kind.name}" for kind in tried)]


@settings(
    max_examples=MUTATIONS,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(
    name=st.deferred(lambda: st.sampled_from(names())),
    place=st.floats(0, 1, exclude_max=True),
    new=st.sampled_from([*NONSENSE, *OTHERS, GONE]),
)
def test_a_broken_config_is_refused_in_one_line_or_it_works(name: str, place: float, new: Any) -> None:
    config = config_of(name)
    every = list(places(config))
    check(broken(config, every[int(place * len(every))], new))
