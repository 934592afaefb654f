"""Who imports whom, read from the sources: for the house rules (`test_packages`) and for `make test-changed` (`changed`)."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

from moejax.core import folders

ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def modules(package: str) -> dict[str, ast.Module]:
    """Dotted name -> syntax tree of every module of a package, whether anybody imports it or not."""
    folder = ROOT / package.replace(".", "/")
    paths = [folder.with_suffix(".py")] if not folder.is_dir() else sorted(folder.rglob("*.py"))
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): ast.parse(path.read_text())
        for path in paths
    }


def imported(tree: ast.Module) -> Iterator[str]:
    """Dotted names that a module imports, anywhere in it, also through `importlib.import_module('...')`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant))


def home(name: str, trees: dict[str, ast.Module]) -> str | None:
    """The module that an imported name lies in; what a package finds on demand, where it finds it."""
    while name:
        if name in trees:
            return name
        package, _, last = name.rpartition(".")
        if package in trees and (ROOT / package.replace(".", "/")).is_dir() and package.startswith("moejax"):
            found = folders.homes(package).get(last, ())
            return found[0] if len(found) == 1 else package
        name = package
    return None
