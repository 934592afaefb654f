"""The tests that a change can have touched, for `make test-changed`: prints what to give to pytest, one a line.

    python tests/changed.py main       # compared with where the branch left `main`; uncommitted and new files too

A test file is touched if it has changed, or anything that it imports, by however many detours. Names that a package finds on demand
(`mj.TopK`) are imports of where they are found; `mj` itself is an import of nothing. What a config builds by its kind is no import:
whatever says the kind's name as a string uses the module that registers it. Of the battery only the subjects that are made of
something changed are tried. Files that are no Python are used by those who say their name or that of one of their folders. What all
tests stand on (`tests/conftest.py`, `pyproject.toml`) touches everything.

Why not pytest-testmon: it learns from a whole run which lines each test ran, so a fresh checkout knows nothing, and it traces
every line of a suite that spends its time in tracing and compiling.
"""

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from import_graph import ROOT, home, imported, modules

PACKAGES = ("pallas_kernels", "moejax", "configs", "experiments", "tests")
EVERYTHING = ("tests/conftest.py", "tests/shape_checks.py", "pyproject.toml", "setup.py")
BATTERY = "tests/battery/test_battery.py"
_REGISTERS = re.compile(r"\.register\(\s*\"(\w+)\"")


def main(argv: list[str]) -> int:
    """Prints the arguments; none if nothing is touched."""
    base = argv[0] if argv else "main"
    print("\n".join(touched(changed(base))))
    return 0


def changed(base: str) -> set[str]:
    """Files, from the repository's root, that differ from where this branch left `base`, or are not committed."""

    def git(*args: str) -> list[str]:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")

    (start, *_) = git("merge-base", base, "HEAD")
    return {name for name in (*git("diff", "--name-only", start), *git("ls-files", "--others", "--exclude-standard")) if name}


def touched(files: set[str]) -> list[str]:
    """What to give to pytest after a change of these files."""
    tests = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py"))
    if files & set(EVERYTHING):
        return ["tests"]
    out = []
    for test in tests:
        used = {file_of(name) for name in reached(module_of(test))} | {test}
        if test == BATTERY:
            out += _of_the_battery(files, used)
        elif used & files or _mentioned(used, files):
            out.append(test)
    return out


@functools.cache
def reached(start: str) -> frozenset[str]:
    """The modules that a module uses, itself included."""
    found, waiting = {start}, [start]
    while waiting:
        for name in arrows().get(waiting.pop(), ()):
            if name not in found:
                found.add(name)
                waiting.append(name)
    return frozenset(found)


@functools.cache
def arrows() -> dict[str, frozenset[str]]:
    """Module -> the modules that it imports, and those that register a kind whose name it says."""
    trees = {name: tree for package in PACKAGES for name, tree in modules(package).items()}
    kinds: dict[str, set[str]] = {}
    for name, tree in trees.items():
        if not name.startswith("tests"):
            for kind in _REGISTERS.findall(ast.unparse(tree).replace("'", '"')):
                kinds.setdefault(kind, set()).add(name)
    helpers = {name.rpartition(".")[2]: name for name in trees if name.startswith("tests.")}
    out = {}
    for name, tree in trees.items():
        targets = {home(target, trees) or helpers.get(target.split(".")[0]) for target in (*imported(tree), *_attributes(tree))}
        said = {module for text in texts(name) for module in kinds.get(text, ())}
        out[name] = frozenset((targets | said) - {None, name})
    return out


@functools.cache
def texts(module: str) -> frozenset[str]:
    """The strings that a module says."""
    (tree,) = (modules(package)[module] for package in PACKAGES if module in modules(package))
    return frozenset(node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))


def _attributes(tree: ast.Module) -> Iterator[str]:
    """`moejax.TopK` for `mj.TopK` after `import moejax as mj`, and for whatever else is found on demand in a module."""
    names = {alias.asname or alias.name: alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names:
            yield f"{names[node.value.id]}.{node.attr}"


def _of_the_battery(files: set[str], used: set[str]) -> list[str]:
    """The subjects that are touched; all of them where the battery is."""
    if used & files:
        return [BATTERY]
    studies = [name for name in modules("experiments") if re.fullmatch(r"experiments\.[a-z_]+\.\w+", name)]
    found = [name.rpartition(".")[2] for name in studies if {file_of(module) for module in reached(name)} & files]
    kinds = {
        kind
        for name, tree in modules("moejax").items()
        if {file_of(module) for module in reached(name)} & files
        for kind in _REGISTERS.findall(ast.unparse(tree).replace("'", '"'))
    }
    ids = [f"test_method[{slug}-{name}]" for slug in found if slug in _slugs() for name in _properties()]
    ids += [f"test_kind[{kind}]" for kind in _kinds() if kind.partition(".")[2] in kinds]
    return [f"{BATTERY}::{name}" for name in ids]


def _slugs() -> list[str]:
    from experiments.battery import subjects

    return subjects.names()


def _properties() -> list[str]:
    from experiments.battery.properties import PROPERTIES

    return list(PROPERTIES)


def _kinds() -> list[str]:
    from experiments.battery.kinds import kinds

    return [str(kind) for kind in kinds()]


def _mentioned(used: set[str], files: set[str]) -> bool:
    """Whether one of the modules says the name of a changed file that is no Python, or of a folder of it."""
    others = [Path(name) for name in files if not name.endswith(".py")]
    names = {part for path in others for part in (path.name, path.as_posix(), *path.parts[:-1])}
    said = {text for file in used for text in texts(module_of(file))}
    return bool(names & {word for text in said if len(text) < 100 for word in (text, *text.split("/"))})


def module_of(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def file_of(module: str) -> str:
    path = ROOT / module.replace(".", "/")
    return (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).relative_to(ROOT).as_posix()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
