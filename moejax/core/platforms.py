"""A machine without accelerators does not look for any.

Where `libtpu` is installed (its compiler needs no TPU), JAX starts it to see whether there is one, and where there is none it says so
in five lines of errors before the first line of any program. So the platform is chosen before JAX looks, on machines that can have no
other than the CPU.
"""

import glob
import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path

# Who sets one of these has chosen, or has a platform that is found in another way. TPU_LIBRARY_PATH is none of them: `libtpu` sets it
# itself, for all processes that one of its starts.
_CHOSEN = ("JAX_PLATFORMS", "JAX_PLATFORM_NAME", "JAX_FORCE_TPU_INIT", "TPU_WORKER_HOSTNAMES", "PJRT_NAMES_AND_LIBRARY_PATHS")
_TPUS = ("/dev/accel*", "/dev/vfio*")
_GPUS = ("/dev/nvidia*", "/dev/dxg", "/dev/kfd")
_GOOGLE = "0x1ae0"  # the vendor of TPUs that are no device files, as JAX looks for them


def skip_absent_tpus() -> None:
    """Sets JAX's platform to the CPU where `libtpu` would be started for nothing; leaves every other machine, and every choice, alone.

    Called by `import moejax`: JAX need not have been imported, and is not.
    """
    if not only_cpu(os.environ):
        return
    if (jax := sys.modules.get("jax")) is None:
        os.environ["JAX_PLATFORMS"] = "cpu"
    elif getattr(getattr(jax, "config", None), "jax_platforms", "") is None:
        jax.config.update("jax_platforms", "cpu")


def only_cpu(environment: Mapping[str, str], root: Path = Path("/")) -> bool:
    """Whether `libtpu` is installed and there is nothing that it or another of JAX's platforms could run on.

    Args:
      environment: variables by name; a choice made there is one.
      root: of the file system whose devices are looked at.
    """
    if any(environment.get(name) for name in _CHOSEN):
        return False
    if importlib.util.find_spec("libtpu") is None or importlib.util.find_spec("jax_plugins") is not None:
        return False
    if any(glob.glob(f"{root}/{pattern}") for pattern in (*_TPUS, *_GPUS)):
        return False
    return not any(_vendor(file) == _GOOGLE for file in glob.glob(f"{root}/sys/bus/pci/devices/*/vendor"))


def _vendor(file: str) -> str:
    try:
        return Path(file).read_text().strip()
    except OSError:
        return ""
