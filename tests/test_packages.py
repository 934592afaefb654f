"""The house rules that a machine can check: dependencies point one way, and no name decides behaviour."""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import moejax

ROOT = Path(__file__).resolve().parents[1]

# Package -> what it may never import. `moejax.models.registry` holds names only and is open to layers.
FORBIDDEN = {
    "pallas_kernels": ["moejax", "experiments", "configs"],
    "moejax.routing": [f"moejax.{p}" for p in ("dispatch", "experts", "layers", "models", "data", "train", "serve")],
    "moejax.dispatch": [f"moejax.{p}" for p in ("experts", "layers", "models", "data", "train", "serve")],
    "moejax.experts": [f"moejax.{p}" for p in ("layers", "models", "data", "train", "serve")],
    "moejax.layers": [f"moejax.{p}" for p in ("models", "data", "train", "serve")],
    "moejax.models": [f"moejax.{p}" for p in ("data", "train", "serve")],
    "moejax.data": [f"moejax.{p}" for p in ("routing", "dispatch", "experts", "layers", "models", "train", "serve")],
    "moejax.surgery": [f"moejax.{p}" for p in ("data", "tasks", "optim", "train", "serve")],
    "moejax.optim": [f"moejax.{p}" for p in ("layers", "models", "data", "tasks", "train", "serve", "surgery")],
    "moejax.tasks": [f"moejax.{p}" for p in ("layers", "models", "data", "optim", "train", "serve")],
    "moejax": ["experiments", "configs", "tests"],
}
ALLOWED = {("moejax.layers", "moejax.models.registry")}


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


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


@pytest.mark.parametrize("package", FORBIDDEN)
def test_dependencies_point_one_way(package: str) -> None:
    found = modules(package)
    assert found
    wrong = [
        f"{module} imports {name}"
        for module, tree in found.items()
        for name in imported(tree)
        for banned in FORBIDDEN[package]
        if inside(name, banned) and not any(package == p and inside(name, allowed) for p, allowed in ALLOWED)
    ]
    assert not wrong


def test_the_check_sees_imports() -> None:
    """A check that finds nothing must be able to find something."""
    assert "moejax.routing.plan.Plan" in set(imported(modules("moejax.dispatch")["moejax.dispatch"]))
    assert inside("moejax.train.fit", "moejax.train")
    assert not inside("moejax.training", "moejax.train")


def decides_by_name(node: ast.AST) -> bool:
    """`x.kind == 'switch'`, `spec['method'] in ('a', 'b')` and the like."""
    if not isinstance(node, ast.Compare):
        return False
    sides = [node.left, *node.comparators]
    names = {side.attr for side in sides if isinstance(side, ast.Attribute)}
    names |= {side.slice.value for side in sides if isinstance(side, ast.Subscript) and isinstance(side.slice, ast.Constant)}
    texts = [s for s in sides if any(isinstance(n, ast.Constant) and isinstance(n.value, str) for n in _elements(s))]
    return bool(names & {"kind", "method", "model_name", "model_type"}) and bool(texts)


def _elements(node: ast.AST) -> list[ast.AST]:
    return list(node.elts) if isinstance(node, (ast.Tuple, ast.List, ast.Set)) else [node]


def test_no_name_decides_behaviour() -> None:
    found = {
        f"{module}:{node.lineno} {ast.unparse(node)}"
        for module, tree in {**modules("moejax"), **modules("pallas_kernels")}.items()
        for node in ast.walk(tree)
        if decides_by_name(node)
    }
    assert not found


@pytest.mark.parametrize(
    ("code", "bad"),
    [
        ("self.kind == 'switch'", True),
        ("spec['kind'] in ('switch', 'gshard')", True),
        ("'soft' != config.method", True),
        ("self.score == 'softmax'", False),
        ("kind not in self._classes", False),
        ("spec.kind == other.kind", False),
    ],
)
def test_the_check_sees_comparisons(code: str, bad: bool) -> None:
    assert any(map(decides_by_name, ast.walk(ast.parse(code)))) == bad


# JAX changes these from release to release; whoever needs one takes it from `moejax.parallel`.
OWNED = ("jax.shard_map", "jax.make_mesh", "jax.set_mesh", "jax.sharding.Mesh(", "jax.sharding.AxisType.")
GONE = ("jax.experimental.pjit", "jax.experimental.shard_map", "jax.experimental.maps")


def test_one_module_owns_meshes_and_shard_map() -> None:
    owner = "moejax.parallel.mesh"
    everywhere = {**modules("moejax"), **modules("pallas_kernels"), **modules("experiments")}
    calls = {
        name: {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, (ast.Attribute, ast.Call))}
        for name, tree in everywhere.items()
    }
    uses = {name: any(call.startswith(OWNED) for call in found) for name, found in calls.items()}
    assert {name for name, used in uses.items() if used} == {owner}
    old = {name for name, tree in everywhere.items() for used in imported(tree) if used.startswith(GONE)}
    assert not old


def test_a_skipped_test_fails_the_suite(tmp_path: Path) -> None:
    """With the hook of this suite, and without what else its conftest sets up."""
    tree = ast.parse((ROOT / "tests/conftest.py").read_text())
    (hook,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "pytest_sessionfinish"]
    (tmp_path / "conftest.py").write_text("import pytest\n\n" + ast.unparse(hook))
    (tmp_path / "test_one.py").write_text("import pytest\n\ndef test_one():\n    pytest.skip('no TPU')\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "/dev/null", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == pytest.ExitCode.TESTS_FAILED
    assert "1 tests were skipped; a test that cannot run must fail" in done.stdout


def test_public_names_resolve_and_the_package_itself_imports_no_jax() -> None:
    for name in moejax.__all__:
        assert getattr(moejax, name).__name__ == name
        assert name in dir(moejax)
    with pytest.raises(AttributeError, match="module 'moejax' has no attribute 'MoEE'"):
        _ = moejax.MoEE
    code = "import sys, moejax, moejax.core.errors, moejax.core.registry; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
