"""Several processes, one program: start-up, and the few things that processes tell each other apart from arrays.

    from moejax.parallel import hosts
    hosts.start()                       # before anything that asks JAX for devices; does nothing on a single machine

Every process runs the same command. Where the others are is found in this order:

1. the arguments of `start` (flags of the command);
2. `MOEJAX_COORDINATOR=host:port`, `MOEJAX_PROCESSES=4` and `MOEJAX_PROCESS=0` (to 3), the same coordinator everywhere: an
   address of process 0. `MOEJAX_COORDINATOR=auto` leaves all three to JAX's own detection;
3. a Slurm job step of several tasks, or a TPU slice of several hosts: JAX detects the rest.

A process that is lost ends the others: at once where the lost connection is noticed (`LostProcess`), or after `heartbeat`
seconds by JAX itself, with a message that names the process. All processes are then started again, and `fit` goes on from the
newest checkpoint.
"""

import contextlib
import dataclasses
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moejax.core.errors import ConfigError

AUTO = "auto"
ENVIRONMENT = {"coordinator": "MOEJAX_COORDINATOR", "processes": "MOEJAX_PROCESSES", "process": "MOEJAX_PROCESS"}

# What JAX's errors say when a process is gone: of the CPU's and GPUs' collectives, and of the coordination service.
_LOST = ("gloo", "connection", "socket closed", "heartbeat", "unavailable", "nccl", "task died", "aborted", "preempted")


class LostProcess(RuntimeError):
    """Another process of the run is gone, so this one cannot go on."""


@dataclasses.dataclass(frozen=True)
class Group:
    """The processes of a run, as one of them sees them; coordinator 'auto' leaves the rest to JAX."""

    coordinator: str
    processes: int = 0
    process: int = 0


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    timeout: float | None = None,
    heartbeat: float | None = None,
) -> int:
    """Joins the other processes, if there are any; the number of processes.

    Args:
      coordinator, processes, process: see the module; what is None comes from the environment.
      timeout: seconds within which all processes must have joined; `MOEJAX_JOIN_TIMEOUT`, or 300.
      heartbeat: seconds of silence after which a process counts as lost; `MOEJAX_HEARTBEAT`, or 60.

    Raises:
      ConfigError: the place is not given in full, or makes no sense.
      TimeoutError: process 0 does not answer. Process 0 itself, in which JAX waits for the others, ends with the status 1.
    """
    group = find(coordinator, processes, process)
    if group is None:
        return 1
    if jax.distributed.is_initialized():
        return jax.process_count()
    timeout = float(os.environ.get("MOEJAX_JOIN_TIMEOUT", 300) if timeout is None else timeout)
    heartbeat = float(os.environ.get("MOEJAX_HEARTBEAT", 60) if heartbeat is None else heartbeat)
    limits = {
        # A little later than this module's own limit, which has a better message.
        "initialization_timeout": int(timeout) + 10,
        "heartbeat_timeout_seconds": max(int(heartbeat), 1),
        # At the end all wait for each other. A process that ends by an error should not wait long for those that cannot follow.
        "shutdown_timeout_seconds": max(int(heartbeat), 1),
    }
    if group.coordinator == AUTO:
        jax.distributed.initialize(**limits)
        return jax.process_count()
    host, _, port = group.coordinator.rpartition(":")
    if group.process == 0:
        _check_free(group.coordinator, int(port))
    else:
        _wait_for(host, int(port), group, timeout)
    with _complaint(group, timeout):
        jax.distributed.initialize(group.coordinator, group.processes, group.process, **limits)
    return jax.process_count()


def find(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> Group | None:
    """Where this process belongs, from the arguments and the environment; None if it is alone.

    Raises:
      ConfigError: part of the place is missing, or a value makes no sense.
    """
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    given = {key: os.environ.get(name) if given[key] is None else given[key] for key, name in ENVIRONMENT.items()}
    if given["coordinator"] == AUTO:
        return Group(AUTO)
    named = {key: value for key, value in given.items() if value not in (None, "")}
    if not named:
        return Group(AUTO) if _detected() else None
    for key, name in ENVIRONMENT.items():
        if key not in named:
            has = ", ".join(f"{k}={v}" for k, v in named.items())
            raise ConfigError(f"several processes need coordinator, processes and process; got {has}, but no {key} ({name})")
    host, _, port = str(named["coordinator"]).rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"coordinator='{named['coordinator']}' must be host:port of process 0, such as 10.0.0.1:8476")
    try:
        count, index = int(named["processes"]), int(named["process"])
    except ValueError:
        raise ConfigError(f"processes='{named['processes']}' and process='{named['process']}' must be numbers") from None
    if not 0 <= index < count:
        raise ConfigError(f"process={index} must lie between 0 and {count - 1}, since processes={count}")
    return Group(str(named["coordinator"]), count, index)


def simulate(devices: int) -> None:
    """Makes the CPU look like several devices of this process, before anything asks JAX for devices.

    Raises:
      ConfigError: not a number of devices; or JAX has started already, with another number.
    """
    if devices < 1:
        raise ConfigError(f"devices={devices} is not a number of devices; give 1 or more")
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", devices)
    except RuntimeError:
        if jax.local_device_count() != devices:
            raise ConfigError(
                f"devices={devices} comes too late: JAX has started with {jax.local_device_count()}; ask for them before "
                "anything is computed"
            ) from None


def is_first() -> bool:
    """Whether this process writes files and talks to the user."""
    return jax.process_index() == 0


def gather(value: Any) -> list[Any]:
    """The JSON values of all processes, in their order. All must call it, in the same place among their computations."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(data.size)).reshape(-1)
    # A power of two, so that few programs are compiled.
    row = np.zeros(max(256, 1 << int(sizes.max()).bit_length()), np.uint8)
    row[: data.size] = data
    rows = multihost_utils.process_allgather(row)
    return [json.loads(bytes(r[:size])) for r, size in zip(np.asarray(rows), sizes, strict=True)]


def share(value: Any) -> Any:
    """Process 0's JSON value, in every process; see `gather`."""
    return gather(value if is_first() else None)[0]


def barrier() -> None:
    """Returns once all processes are here."""
    gather(None)


class Agreement:
    """A number that processes agree on from step to step, without waiting for each other: the largest that any has said.

    Each step's numbers are reduced on the devices, after that step's own work, and read one step later. All processes so read
    the same number at the same step, and the devices never run dry.
    """

    def __init__(self, mesh: Mesh):
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._size, self._local = mesh.size, sum(d.process_index == jax.process_index() for d in mesh.devices.flat)
        self._last: Any = None

    def __call__(self, number: int) -> int:
        """Says `number` for this step; the largest that was said at the last one, 0 at first."""
        mine = np.full(self._local, number, np.int32)
        said = jax.make_array_from_process_local_data(self._sharding, mine, (self._size,))
        last, self._last = self._last, self._largest(said)
        return 0 if last is None else int(last)


def lost(error: BaseException) -> bool:
    """Whether an error of JAX means that another process is gone."""
    text = str(error).lower()
    return jax.process_count() > 1 and isinstance(error, jax.errors.JaxRuntimeError) and any(word in text for word in _LOST)


def _detected() -> bool:
    """Whether this looks like one of several processes that JAX can find by itself."""
    slurm = "SLURM_STEP_NODELIST" in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1
    return slurm or len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1


def _check_free(coordinator: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise ConfigError(
                f"coordinator='{coordinator}': port {port} is taken on process 0 ({error}); take another"
            ) from None


def _wait_for(host: str, port: int, group: Group, timeout: float) -> None:
    """Returns once somebody listens: JAX would wait too, but end the process without saying why."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            with socket.create_connection((host, port), timeout=max(min(5.0, timeout), 0.1)):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"process {group.process} of {group.processes}: nobody answers at coordinator={group.coordinator} after "
                    f"{timeout:g} s ({error}); is process 0 running, is this its address, and is the port open?"
                ) from None
            time.sleep(0.2)


@contextlib.contextmanager
def _complaint(group: Group, timeout: float) -> Iterator[None]:
    """Ends the process with a message if the block takes longer: JAX waits for the others inside C++ and then aborts."""

    def end() -> None:
        print(
            f"process {group.process} of {group.processes}: not all processes have joined at coordinator={group.coordinator} "
            f"after {timeout:g} s; start each with {ENVIRONMENT['processes']}={group.processes} and its own "
            f"{ENVIRONMENT['process']}, or allow more time with MOEJAX_JOIN_TIMEOUT",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    timer = threading.Timer(timeout, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
