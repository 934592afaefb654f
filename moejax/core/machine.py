"""How much memory there is: what cannot be held is refused before anything of it is made."""

import contextlib
import math
import os
from pathlib import Path

# What a container may use: version 2 and version 1 of Linux's control groups.
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def memory() -> int | float:
    """Bytes of memory of this machine, or of its container; infinity where the system does not tell."""
    found = [math.inf]
    with contextlib.suppress(ValueError, OSError, AttributeError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for file in _LIMITS:
        with contextlib.suppress(ValueError, OSError):  # 'max', or no such file
            found.append(int(file.read_text()))
    return min(size for size in found if size > 0)


def gigabytes(size: int | float) -> str:
    """5400000000 -> '5.4 GB'; with fewer zeros where it is small."""
    unit, name = next(((u, n) for u, n in ((1e9, "GB"), (1e6, "MB")) if size >= u), (1e3, "kB"))
    return f"{size / unit:,.0f} {name}" if size >= 1e3 * unit else f"{size / unit:.3g} {name}"
