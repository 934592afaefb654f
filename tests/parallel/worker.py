"""A small routed language model and its data, and one process of a run that trains it on several.

`python tests/parallel/worker.py WORKDIR '{"mesh": "ep"}' DEVICES KILL_AT DELAY` joins the others that the environment names, trains, and at
step KILL_AT kills itself with SIGKILL.
"""

import importlib.metadata
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

VOCAB, LENGTH = 16, 8


def blocks() -> dict[str, Any]:
    """Dense, dropless and with capacity; small enough that a layer compiles in a second."""
    mixer = {"kind": "attention", "num_heads": 2, "num_kv_heads": 2}
    moe = {
        "kind": "moe",
        "num_experts": 4,
        "router": {"kind": "linear"},
        "select": {"kind": "top_k", "k": 2},
        "bank": {"kind": "glu", "hidden": 16},
        "losses": {"balance": {"coef": 0.05}},
    }
    ffns = {
        "dense": {"kind": "glu", "hidden": 16},
        "moe": moe,
        "capacity": {**moe, "select": {"kind": "top_k", "k": 2, "capacity_factor": 1.0}},
    }
    norm = {"kind": "rms_norm"}
    return {name: {"kind": "transformer", "mixer": mixer, "norm": norm, "ffn": ffn} for name, ffn in ffns.items()}


def config(**changes: Any) -> ConfigDict:
    """One layer, 12 steps of 8 rows; `changes` are dotted names with dots written as double underscores."""
    made = ConfigDict(
        {
            "model": {
                "kind": "decoder_lm",
                "vocab_size": VOCAB,
                "d_model": 16,
                "num_layers": 1,
                "pattern": ("moe",),
                "blocks": blocks(),
            },
            "data": {"name": "rows", "batch_size": 8},
            "task": {"kind": "next_token"},
            "optimizer": {"kind": "adamw", "learning_rate": 1e-2, "warmup_steps": 2},
            "train": {"steps": 12, "log_every": 1},
            "eval": {"batches": 2},
            "checkpoint": {"every": 4},
        }
    )
    with made.unlocked():
        made.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return made


# Compiled without care: these programs run for milliseconds. The emitters are a stage of the compiler that jaxlib 0.12 lacks.
_EMITTERS = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 12)
FLAGS = "--xla_backend_optimization_level=0" + (" --xla_cpu_use_fusion_emitters=false" if _EMITTERS else "")


def quick(lowered: Any) -> Any:
    """The compiled program, compiled without care."""
    return lowered.compile({"xla_cpu_use_fusion_emitters": False} if _EMITTERS else None)


class Rows:
    """Rows that count upwards from a random start with a random step, some of them padded; the i-th shard has the i-th block."""

    def __init__(
        self, config: Any, split: str, seed: int = 0, num_epochs: int | None = None, shard_index: int = 0, shard_count: int = 1
    ):
        self.size, self.index, self.count = config["batch_size"], shard_index, shard_count
        self.seed, self.done = (seed, split == "train"), 0

    def __iter__(self) -> "Rows":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        draw = np.random.default_rng((*self.seed, self.done))
        b = self.size
        start, stride = draw.integers(0, VOCAB, (b, 1)), draw.integers(1, 4, (b, 1))
        tokens = (start + stride * np.arange(LENGTH + 1)) % VOCAB
        used = np.arange(LENGTH) < draw.integers(LENGTH // 2, LENGTH + 1, (b, 1))
        batch = {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "valid": used,
            "segments": used,
            "positions": np.tile(np.arange(LENGTH), (b, 1)),
            "example_id": self.done * b + np.arange(b),
        }
        self.done += 1
        kinds = {"valid": bool, "example_id": np.int64}
        return {k: np.split(v.astype(kinds.get(k, np.int32)), self.count)[self.index] for k, v in batch.items()}

    def get_state(self) -> Any:
        return {"done": self.done}

    def set_state(self, state: Any) -> None:
        self.done = state["done"]


def run(workdir: Any, make_iterator: Any = Rows, progress: Any = None, **changes: Any) -> Any:
    """`fit` of `config(**changes)`."""
    from moejax.train import fit

    return fit(config(**changes), 0, workdir, progress, "rows", make_iterator=make_iterator)


def main(workdir: str, changes: str = "{}", devices: str = "1", kill_at: str = "0", delay: str = "0") -> int:
    from moejax.parallel import hosts

    hosts.simulate(int(devices))
    hosts.start()

    class Deadly(Rows):
        def __next__(self) -> dict[str, np.ndarray]:
            time.sleep(float(delay))
            if self.seed[1] and int(kill_at) and self.done == int(kill_at):
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__next__()

    def progress(report: Any) -> None:
        if report.phase == "train" and report.step > 0:
            Path(workdir, "started").touch()

    try:
        run(workdir, Deadly, progress, **json.loads(changes))
    except hosts.LostProcess as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(75)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
