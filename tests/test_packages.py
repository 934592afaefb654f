"""The house rules that a machine can check: dependencies point one way, and no name decides behaviour."""

import ast
import importlib
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
from import_graph import ROOT, home, imported, modules

import moejax
from moejax.core.registry import Registry

# The floors of the house, from the ground up: a room imports only what lies below it, never a room of its own floor.
FLOORS = [
    ["pallas_kernels", "moejax.core"],
    ["moejax.parallel"],
    ["moejax.routing"],
    ["moejax.dispatch"],
    ["moejax.experts"],
    ["moejax.layers"],
    ["moejax.models"],
    ["moejax.pretrained"],
    ["moejax.data", "moejax.optim", "moejax.surgery"],
    ["moejax.tasks"],
    ["moejax.train"],
    ["moejax.serve", "moejax.analysis", "moejax.adapt"],
    ["moejax.aot"],
    ["configs"],
    ["experiments"],
]
ROOMS = [room for floor in FLOORS for room in floor if (ROOT / room.replace(".", "/")).is_dir()]


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


@pytest.mark.parametrize("room", ROOMS)
def test_arrows_point_down(room: str) -> None:
    floor = next(i for i, rooms in enumerate(FLOORS) if room in rooms)
    above = [other for rooms in FLOORS[floor:] for other in rooms if other != room] + ["tests"]
    found = modules(room)
    assert found
    wrong = [
        f"{module} imports {name}"
        for module, tree in found.items()
        for name in imported(tree)
        for banned in above
        if inside(name, banned)
    ]
    assert not wrong


def test_every_room_has_a_floor() -> None:
    there = {f"moejax.{path.parent.name}" for path in (ROOT / "moejax").glob("*/__init__.py")}
    assert there <= set(ROOMS)


def test_no_module_imports_itself_by_a_detour() -> None:
    """Whatever is imported inside functions included. A package's own `__init__` imports on demand and is left out."""
    trees = {name: tree for room in ROOMS for name, tree in modules(room).items()}
    arrows = {name: {home(target, trees) for target in imported(tree)} - {None, name} for name, tree in trees.items()}
    assert sum(map(len, arrows.values())) > 500
    assert circle(arrows) == []


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """Modules that lie on a circle of arrows; none if there is no circle."""
    left = {name: set(targets) for name, targets in arrows.items()}
    while free := {name for name, targets in left.items() if not targets & left.keys()}:
        left = {name: targets for name, targets in left.items() if name not in free}
    while free := {name for name in left if not any(name in targets for targets in left.values())}:
        left = {name: targets for name, targets in left.items() if name not in free}
    return sorted(left)


def test_the_check_sees_circles() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_the_check_sees_imports() -> None:
    """A check that finds nothing must be able to find something."""
    assert "moejax.routing.plan.Plan" in set(imported(modules("moejax.dispatch")["moejax.dispatch.entry"]))
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


def test_every_registered_class_and_every_room_is_found_under_its_name() -> None:
    """`mj.<Name>`; an unknown one names the nearest. Nothing heavy is imported before it is asked for."""
    for registry in (value for value in vars(registries()).values() if isinstance(value, Registry)):
        for kind, cls in registry.items():
            if cls.__module__.startswith("moejax"):
                assert getattr(moejax, cls.__name__) is cls, (registry.slot, kind)
                assert cls.__name__ in dir(moejax)
    for room in ROOMS:
        if room.startswith("moejax."):
            assert getattr(moejax, room.removeprefix("moejax.")).__name__ == room
    with pytest.raises(AttributeError, match=r"module 'moejax' has no attribute 'MoEE'; did you mean 'MoE'\?"):
        _ = moejax.MoEE
    code = "import sys, moejax, moejax.core.errors, moejax.core.registry; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def registries() -> types.SimpleNamespace:
    """Every registry of the library, found by reading the sources."""
    found = {
        name: getattr(importlib.import_module(module), name)
        for module, tree in modules("moejax").items()
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Call)
        if ast.unparse(node.value.func) == "Registry"
        for name in [(node.targets[0] if isinstance(node, ast.Assign) else node.target).id]
    }
    assert len(found) >= 12
    return types.SimpleNamespace(**found)


@pytest.mark.parametrize("module", ["jax._src.core", "flax.linen", "moejax.routing.plan"])
def test_what_is_announced_to_be_removed_fails_the_suite(module: str) -> None:
    with pytest.raises(DeprecationWarning):
        warnings.warn_explicit("this goes", DeprecationWarning, "file.py", 1, module)
    with pytest.raises(DeprecationWarning):
        warnings.warn_explicit("optax.something is deprecated", DeprecationWarning, "file.py", 1, "elsewhere")


@pytest.mark.parametrize("module", ["jaxtyping._decorator", "traitlets.config"])
def test_what_other_packages_announce_does_not(module: str) -> None:
    warnings.warn_explicit("this goes", DeprecationWarning, "file.py", 1, module)
