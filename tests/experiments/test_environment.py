"""What a run says of its machine, and memory that it keeps."""

import platform
import subprocess
import sys

import pytest

MEASURE = """
import sys
import numpy as np
from experiments.environment import keep_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

if sys.argv[1] == "kept":
    assert keep_freed_memory()
array = np.ones(2**25)
full = resident()
del array
print(full - resident())
"""


@pytest.mark.parametrize(("mode", "given_back"), [("kept", 0), ("default", 256)])
def test_freed_memory_is_kept_where_asked_for(mode: str, given_back: int) -> None:
    """A freed array of 256 MiB, in megabytes that went back to the system."""
    assert platform.system() == "Linux"
    done = subprocess.run([sys.executable, "-c", MEASURE, mode], capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(given_back, abs=16)
