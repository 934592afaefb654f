"""JAX looks for no TPU where there can be none, and for everything where there may be."""

import importlib.machinery
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moejax.core.platforms import only_cpu

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("modules", ["moejax, jax", "jax, moejax"])
def test_a_program_begins_without_a_word(modules):
    """`libtpu` is installed with the tests. On a machine with an accelerator this asks for the same of JAX itself."""
    environment = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")} | {"PYTHONPATH": str(ROOT)}
    assert importlib.util.find_spec("libtpu") is not None
    program = f"import {modules}; print(jax.devices()[0].platform)"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    assert done.stdout.strip()


def test_importing_moejax_imports_neither_jax_nor_numpy():
    program = "import sys, moejax; print([m for m in ('jax', 'numpy', 'flax') if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]"


@pytest.fixture
def nothing(tmp_path, monkeypatch):
    """A machine with `libtpu` and without devices or plugins of other makers."""
    there = {"libtpu": importlib.machinery.ModuleSpec("libtpu", None)}
    monkeypatch.setattr(importlib.util, "find_spec", there.get)
    return tmp_path, there


def test_a_machine_with_nothing_has_only_a_cpu(nothing):
    root, there = nothing
    assert only_cpu({}, root)
    del there["libtpu"]
    assert not only_cpu({}, root)  # JAX is silent then, and nothing need be chosen


@pytest.mark.parametrize("device", ["dev/accel0", "dev/vfio/0", "dev/nvidia0", "dev/nvidiactl", "dev/kfd", "dev/dxg"])
def test_a_machine_with_a_device_is_left_alone(nothing, device):
    root, _ = nothing
    (root / device).parent.mkdir(parents=True)
    (root / device).touch()
    assert not only_cpu({}, root)


@pytest.mark.parametrize(("vendor", "alone"), [("0x1ae0", False), ("0x8086", True)])
def test_a_tpu_on_the_bus_is_left_alone(nothing, vendor, alone):
    root, _ = nothing
    place = root / "sys/bus/pci/devices/0000:00:04.0"
    place.mkdir(parents=True)
    (place / "vendor").write_text(f"{vendor}\n")
    assert only_cpu({}, root) == alone


def test_a_plugin_and_a_choice_are_left_alone(nothing):
    root, there = nothing
    for name in ("JAX_PLATFORMS", "JAX_FORCE_TPU_INIT", "TPU_WORKER_HOSTNAMES", "PJRT_NAMES_AND_LIBRARY_PATHS"):
        assert not only_cpu({name: "tpu"}, root)
    there["jax_plugins"] = importlib.machinery.ModuleSpec("jax_plugins", None)
    assert not only_cpu({}, root)
