"""Compiling kernels for a TPU that is not there, with the TPU compiler that comes with libtpu (`pip install "jax[tpu]"`)."""

import functools
import os
import re
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import topologies

from pallas_kernels.implementations import target

# The smallest topology that libtpu describes, of each kind of chip.
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}

# libtpu asks a cloud's metadata server which machine it is on, and complains where there is none.
_NO_MACHINE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # test processes side by side
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_LOG_DIR": "disabled",
}


def device_of(kind: str) -> jax.Device:
    """A described (absent) device of a chip kind: v5e, v5p, v6e or tpu7x."""
    return devices_of(TOPOLOGIES[kind])[0]


@functools.cache
def devices_of(topology: str) -> tuple[jax.Device, ...]:
    """The described (absent) devices of a slice of a pod, such as 'v5e:16x16'.

    Raises:
      jax.errors.JaxRuntimeError: libtpu knows no such chip or slice.
    """
    if jax.default_backend() != "tpu":
        for name, value in _NO_MACHINE.items():
            os.environ.setdefault(name, value)
    return tuple(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)


def compile_for(kind: str, function: Callable[..., Any], *args: Any) -> jax.stages.Compiled:
    """Compiles `function` for one device of `kind`; it cannot run here, but its text, costs and memory can be read.

    Tracing happens within `target(kind)`, so that 'auto' and tuning tables answer for that chip. A function that is itself
    jitted and was traced before for another chip keeps that trace: give the plain function.

    Args:
      kind: a key of `TOPOLOGIES`.
      function: of arrays, or of pytrees of arrays.
      args: its arguments, as arrays or `jax.ShapeDtypeStruct`s; only shapes and dtypes matter.
    """
    sharding = jax.sharding.SingleDeviceSharding(device_of(kind))
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), args)
    with target(kind):
        # A new function object each time, since jit remembers traces by function, whatever the target.
        return jax.jit(lambda *a: function(*a)).lower(*shapes).compile()


def custom_calls(compiled: jax.stages.Compiled) -> list[str]:
    """The Mosaic kernels in a program compiled for TPU, by the `name=` of their `pallas_call`, in order, with repeats.

    A kernel that XLA itself put there goes by the name of the operation that it stands for.
    """
    # An instruction begins on a line of its own, and may have line breaks inside.
    instructions = re.split(r"\n(?=\s*(?:ROOT )?%)", compiled.as_text())
    calls = [text for text in instructions if 'custom_call_target="tpu_custom_call"' in text]
    return [_kernel_name(re.search(r'op_name="((?:[^"\\]|\\.)*)"', text)[1]) for text in calls]


def _kernel_name(op_name: str) -> str:
    """`relu` of `jit(f)/transpose(jvp(relu))/pallas_call`."""
    *_, name = op_name.removesuffix("/pallas_call").split("/")
    return re.sub(r"\w+\(|\)", "", name)
