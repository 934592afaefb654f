"""How much memory there is: what cannot be held is refused before anything of it is made."""

import math
import os
from pathlib import Path

# What a container may use: version 2 and version 1 of Linux's control groups.
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def memory() -> float:
    """Bytes of memory of this machine, or of its container; infinity where the system does not tell."""
    found = [math.inf]
    try:
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (ValueError, OSError, AttributeError):
        pass
    for file in _LIMITS:
        try:
            found.append(int(file.read_text()))
        except (ValueError, OSError):  # 'max', or no such file
            pass
    return min(size for size in found if size > 0)


def gigabytes(size: float) -> str:
    """5400000000 -> '5.4 GB'."""
    return f"{size / 1e9:,.3g} GB" if size < 1e12 else f"{size / 1e9:,.0f} GB"
