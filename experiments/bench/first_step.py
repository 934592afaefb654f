"""How long a person waits: from the command to the first step, each time in a process of its own.

import     what every training imports
cold       two steps of the demo's mixture, when nothing has been compiled before
known      the same once more: its programs are found compiled
seed       another seed in the same process
smoke      `python -m experiments.run --preset=smoke`: four arms of four steps, judged and drawn
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from experiments.bench.table import Outcome
from experiments.bench.timing import Timing

IMPORT, COLD, KNOWN, SEED, SMOKE = "import", "cold", "known", "seed", "smoke"
SHAPES = {"demo": None}
WAIT = "first step"
_RUN = """
import sys, time
start = time.perf_counter()
import jax
from experiments import study as studies
from moejax.train import fit
jax.config.update("jax_compilation_cache_dir", sys.argv[1] + "/compiled")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
brief = {"train.steps": 2, "eval.every": 0, "optimizer.warmup_steps": 1}
config = studies.resolve(studies.load("first_mixture"), "cpu", "switch8", brief)
for seed in range(int(sys.argv[2])):
    start = start if seed == 0 else time.perf_counter()
    fit(config, seed=seed, workdir=f"{sys.argv[1]}/{time.time()}")
print(time.perf_counter() - start)
"""


def run(names: list[str], repeats: int) -> Iterator[Outcome]:
    """The one case, `repeats` times."""
    seconds: dict[str, list[float]] = {name: [] for name in (IMPORT, COLD, KNOWN, SEED, SMOKE)}
    for _ in range(repeats if names else 0):
        with tempfile.TemporaryDirectory() as folder:
            seconds[IMPORT].append(_wall("-c", "import jax, moejax.train"))
            seconds[COLD].append(_wall("-c", _RUN, folder, "1"))
            seconds[KNOWN].append(_wall("-c", _RUN, folder, "1"))
            seconds[SEED].append(_told("-c", _RUN, folder, "2"))
            seconds[SMOKE].append(_wall("-m", "experiments.run", "--preset=smoke", f"--runs={folder}/runs"))
    timings = {}
    for name, values in seconds.items():
        low, median, high = statistics.quantiles(values, n=4)
        timings[name] = Timing(median, low, high, compile_seconds=0.0, temp_bytes=0)
    notes = tuple(f"{name}: {t.median:.1f} s" for name, t in timings.items())
    yield Outcome("demo", "seconds before the demo's mixture has taken its first steps", IMPORT, {WAIT: timings}, notes=notes)


def _wall(*arguments: str) -> float:
    start = time.perf_counter()
    _process(*arguments)
    return time.perf_counter() - start


def _told(*arguments: str) -> float:
    """The seconds that the process prints last."""
    return float(_process(*arguments).split()[-1])


def _process(*arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION")}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, *arguments], cwd=root, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)[:80]}: {done.stderr[-2000:]}")
    return done.stdout
