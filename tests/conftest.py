"""Eight simulated devices in every run, CPU only, and run-time checks of shapes and types on the library."""

import gc
import os
import shutil
import sys
import tempfile
from importlib import metadata
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# The suite compiles thousands of tiny programs and runs each a few times: unoptimised machine code, by the quicker of two emitters,
# where there still are two.
QUICKER = " --xla_cpu_use_fusion_emitters=false" if metadata.version("jaxlib") < "0.11" else ""
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0{QUICKER}"
)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Programs that occur twice are compiled once in a run, whichever of its processes meets them first: those of xdist, and those that
# tests start, find the folder in their environment.
MADE_CACHE = "JAX_COMPILATION_CACHE_DIR" not in os.environ
if MADE_CACHE:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="moejax-tests-")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# Tracing makes many objects and few circles: the collector would look through all of them, again and again, for a tenth of the time.
gc.set_threshold(200_000, 20, 100)

sys.path.insert(0, os.path.dirname(__file__))

import shape_checks

shape_checks.install(["moejax", "pallas_kernels"])

import zlib

import jax
import numpy as np
import pytest


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """NumPy generator seeded by the test's name."""
    return np.random.default_rng(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def key(request: pytest.FixtureRequest) -> jax.Array:
    """JAX key seeded by the test's name."""
    return jax.random.key(zlib.crc32(request.node.nodeid.encode()))


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Forgets compiled programs before there are too many.

    Linux grants a process 65,530 mappings of memory, a program on CPU takes a few, and the one too many ends the process.
    """
    try:
        mappings = Path("/proc/self/maps").read_bytes().count(b"\n")
    except OSError:  # no Linux, no such limit
        return
    if mappings > 20_000:
        jax.clear_caches()
        gc.collect()


def pytest_unconfigure() -> None:
    """The programs are of one run."""
    if MADE_CACHE:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A test that cannot run fails: green because skipped is not green."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter else []
    if skipped:
        reporter.write_line(f"{len(skipped)} tests were skipped; a test that cannot run must fail", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
