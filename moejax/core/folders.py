"""Folders speak for themselves: what lies in a package is found by reading file names and first columns, never from a list.

    __getattr__, __dir__ = lazy(__name__)      # in an __init__.py: every public class and function below, imported on first use
    import_all('moejax.routing.routers')       # every module of a folder, so that its classes register themselves

Finding out where a name lives reads files and imports none of them, so `import moejax` stays instant.
"""

import functools
import importlib
import importlib.util
import pkgutil
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moejax.core.errors import nearest

# Top-level definitions: classes, functions, registries, and names of types or constants in capitals.
_DEFINED = re.compile(
    r"^(?:class|def) (?P<made>[A-Za-z]\w*)|^(?P<registry>[a-z]\w*)(?:: Registry)? = Registry\(|^(?P<constant>[A-Z]\w*)(?:: [^=\n]+)? = ",
    re.MULTILINE,
)


def lazy(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package: its subpackages and modules, and what they define, imported on first use."""

    def get(name: str) -> Any:
        found = homes(package).get(name, ())
        if name.startswith("_") or not (found or name in _inside(package)):
            raise AttributeError(f"module '{package}' has no attribute '{name}'{nearest(name, public(package))}")
        if name in _inside(package):
            return importlib.import_module(f"{package}.{name}")
        if len(found) > 1:
            raise AttributeError(f"'{name}' is defined in {' and '.join(found)}; import it from the one you mean")
        return getattr(importlib.import_module(found[0]), name)

    return get, lambda: public(package)


def public(package: str) -> list[str]:
    """The names that a package answers to: what is defined in one place below it, and what it is made of."""
    return sorted({name for name, found in homes(package).items() if len(found) == 1} | set(_inside(package)))


def import_all(folder: str) -> None:
    """Imports a module or every module of a package, subpackages included; what registers itself is registered after that."""
    package = importlib.import_module(folder)
    for module in pkgutil.walk_packages(getattr(package, "__path__", ()), f"{folder}."):
        if not module.name.rpartition(".")[2].startswith("__"):
            importlib.import_module(module.name)


@functools.cache
def homes(package: str) -> dict[str, tuple[str, ...]]:
    """Name -> the modules below `package` that define it at their top level."""
    found: dict[str, list[str]] = {}
    for root in _roots(package):
        for file in sorted(root.rglob("*.py")):
            parts = file.relative_to(root).with_suffix("").parts
            if any(part.startswith("_") for part in parts):
                continue
            for match in _DEFINED.finditer(file.read_text(encoding="utf-8")):
                found.setdefault(match[match.lastgroup or 0], []).append(".".join((package, *parts)))
    return {name: tuple(dict.fromkeys(modules)) for name, modules in found.items()}


@functools.cache
def _inside(package: str) -> tuple[str, ...]:
    """The modules and subpackages directly inside a package."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules([str(r) for r in _roots(package)]) if not m.name.startswith("_")))


def _roots(package: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    return [Path(root) for root in (spec.submodule_search_locations if spec else None) or ()]
