"""Renaming and leaving out."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from moejax.core.errors import ConfigError
from moejax.core.params import Path
from moejax.core.paths import find, matches
from moejax.surgery.base import Checkpoint, Leaves, Target, spelt, surgeries


@surgeries.register("rename")
@dataclasses.dataclass(frozen=True)
class Rename:
    """Moves arrays to other paths; what no pattern matches stays where it is.

        rename = {'kind': 'rename', 'paths': {'encoder/*': 'stack/*', '*/old_norm/scale': '*/norm/scale'}}

    Attributes:
      paths: pattern of a whole path -> where to; the text of each `*` is put in the place of the `*`s of the new path, in order.

    Raises:
      ConfigError: a pattern matches nothing, two patterns match one path, or two arrays would get the same path.
    """

    paths: Mapping[str, str]

    def __post_init__(self):
        for old, new in self.paths.items():
            if old.count("*") != new.count("*"):
                raise ConfigError(f"rename.paths: '{old}' and '{new}' must have the same number of *")

    def __call__(self, checkpoint: Checkpoint, target: Target) -> Checkpoint:
        leaves = checkpoint.leaves
        moved: dict[Path, Path] = {}
        for old, new in self.paths.items():
            hits = {path: hit for path in leaves if (hit := re.fullmatch(_regex(old), spelt(path)))}
            if not hits:
                find(old, map(spelt, leaves), "rename.paths")
                raise ConfigError(f"'{old}' in rename.paths must match whole paths; add /* for what is inside")
            for path, hit in hits.items():
                if path in moved:
                    raise ConfigError(f"rename.paths: '{spelt(path)}' is matched by two patterns, the second is '{old}'")
                moved[path] = _path(path, _filled(new, hit.groups()))
        out: Leaves = {}
        for path, value in leaves.items():
            to = moved.get(path, path)
            if to in out:
                raise ConfigError(f"rename.paths: two arrays would be called '{spelt(to)}'")
            out[to] = value
        return checkpoint.with_leaves(out)


@surgeries.register("keep")
@dataclasses.dataclass(frozen=True)
class Keep:
    """Keeps some of the arrays and leaves out the rest: a head for other classes, another depth.

    Attributes:
      paths: patterns of what stays; see `moejax.core.paths.matches`.
      without: patterns of what goes all the same.

    Raises:
      ConfigError: a pattern matches nothing.
    """

    paths: tuple[str, ...] = ("*",)
    without: tuple[str, ...] = ()

    def __call__(self, checkpoint: Checkpoint, target: Target) -> Checkpoint:
        leaves = checkpoint.leaves
        for name, patterns in (("paths", self.paths), ("without", self.without)):
            for pattern in patterns:
                find(pattern, map(spelt, leaves), f"keep.{name}")

        def fits(path: Path, patterns: tuple[str, ...]) -> bool:
            return any(matches(spelt(path), pattern) for pattern in patterns)

        return checkpoint.with_leaves(
            {path: x for path, x in leaves.items() if fits(path, self.paths) and not fits(path, self.without)}
        )


def _regex(pattern: str) -> str:
    return "(.*)".join(re.escape(part) for part in pattern.split("*"))


def _filled(pattern: str, texts: tuple[str | Any, ...]) -> str:
    first, *rest = pattern.split("*")
    return first + "".join(text + part for text, part in zip(texts, rest, strict=True))


def _path(old: Path, name: str) -> Path:
    """The path that a new spelling means: in the collection of the old one."""
    parts = tuple(name.split("/"))
    return ("params", *parts) if old[0] == "params" else parts
