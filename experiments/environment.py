"""Where a run was made: commit, versions, device, date. Written into every run, so that a ledger entry can name them."""

import contextlib
import ctypes
import datetime
import functools
import math
import os
import platform
import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
SOURCES = ("moejax", "pallas_kernels", "experiments", "configs")


def describe() -> dict[str, str]:
    """Commit, jax version, Python version, device and UTC date, as short strings."""
    import jax

    return {
        "commit": commit(),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": device(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


@functools.cache
def commit() -> str:
    """Short hash of the checkout, with `+changes` if the sources differ from it; 'unknown' outside a checkout."""
    head = _git("rev-parse", "--short", "HEAD")
    if not head:
        return "unknown"
    changed = _git("status", "--porcelain", "--", *SOURCES, ":!experiments/ledger", ":!experiments/catalog.toml")
    return f"{head}+changes" if changed else head


@functools.cache
def device() -> str:
    """What computes: `2 x NVIDIA H100`, or the CPU's model and its cores."""
    import jax

    devices = jax.devices()
    if devices[0].platform == "cpu":
        return f"{cpu()}, {os.cpu_count()} cores"
    return f"{len(devices)} x {devices[0].device_kind}"


def cpu() -> str:
    """The CPU's model name, or its architecture where the system does not tell."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def machine() -> str:
    """Architecture and vector units: what XLA compiles CPU code for, and so what may change a sum's last bits."""
    units = set((_cpuinfo().get("flags") or _cpuinfo().get("Features") or "").split())
    known = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "asimd", "sve")
    return " ".join([platform.machine(), *(unit for unit in known if unit in units)])


def keep_freed_memory() -> bool:
    """Lets this process keep the memory that it frees, where the C library can (glibc); whether it does now.

    On a CPU, XLA allocates the temporaries of every step anew. The large ones would come from the system each time and go back to
    it, which maps and zeroes all their pages again: a quarter of a small model's training step, dense or mixture.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if platform.system() == "Linux" else None
    trim_threshold, mmap_max = -1, -4  # of malloc.h
    return mallopt is not None and bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, -1))


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory() -> float:
    """Bytes that this process and those that it starts may still take; infinity where nobody tells."""
    free = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free.append(next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")))
    with contextlib.suppress(OSError, ValueError):  # 'max' is no number: a container without a limit
        limit, used = (int((Path("/sys/fs/cgroup") / name).read_text()) for name in ("memory.max", "memory.current"))
        free.append(float(limit - used))
    return min(free, default=math.inf)


@functools.cache
def _cpuinfo() -> dict[str, str]:
    """The first processor's fields in Linux's `/proc/cpuinfo`; empty elsewhere."""
    info = Path("/proc/cpuinfo")
    first = info.read_text().split("\n\n")[0] if info.exists() else ""
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
