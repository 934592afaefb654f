"""Eight simulated devices in every run, CPU only, and run-time checks of shapes and types on the library."""

import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
# Unoptimised machine code: the suite compiles hundreds of tiny programs and runs each a few times.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

sys.path.insert(0, os.path.dirname(__file__))

from jaxtyping import install_import_hook

install_import_hook(["moejax", "pallas_kernels"], "shape_checks.check")

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


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A test that cannot run fails: green because skipped is not green."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter else []
    if skipped:
        reporter.write_line(f"{len(skipped)} tests were skipped; a test that cannot run must fail", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
