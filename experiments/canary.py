"""A tiny fixed training whose losses are known: it notices that the library's numbers changed while its cached runs did not.

The losses are kept in `experiments/ledger/canary.json` per jax version, platform and machine. A machine that is not there
yet is added, to the file beside the runs unless results are recorded for the repository. The training is repeated only when a source file of the library or a version changed.
"""

import hashlib
import importlib.metadata
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments import environment
from experiments.cache import NUMERICS_VERSION
from moejax.core.errors import ConfigError
from moejax.core.files import read_sealed, seal, set_aside, unseal, write_json, write_sealed

TOLERANCE = 1e-5
STEPS = 5
PACKAGES = ("jax", "jaxlib", "flax", "optax", "grain")


def check(
    runs: Path,
    record: Path,
    fit: Callable[..., Any],
    accept: bool = False,
    say: Callable[[str], None] = print,
    shipped: Path | None = None,
) -> None:
    """Compares the canary's losses with those in file `record`, or else in file `shipped`; records them in `record` where there are none.

    Args:
      runs: where the last result is kept, by hash of the sources.
      accept: record the new losses whatever the old ones were.

    Raises:
      ConfigError: the losses differ by more than `TOLERANCE` (relative) under the same `NUMERICS_VERSION`.
    """
    name = platform_key()
    written = _known(record)
    known = {**(_known(shipped) if shipped else {}), **written}
    losses = _losses(runs, fit, say)
    old = None if accept else _trusted(known, name, record)
    if old is None or accept or old["numerics"] != NUMERICS_VERSION:
        write_json(record, {**written, name: seal({"numerics": NUMERICS_VERSION, "losses": losses})}, indent=1)
        return
    for step, (now, before) in enumerate(zip(losses, old["losses"], strict=True), start=1):
        if not abs(now - before) <= TOLERANCE * abs(before):
            raise ConfigError(
                f"the library's numbers changed: loss {now:.7g} at step {step} of the canary was {before:.7g} in "
                f"{record.name} ({name}); bump NUMERICS_VERSION={NUMERICS_VERSION} in experiments/cache.py so that cached "
                "runs are trained afresh, or record the new numbers with --accept_numerics"
            )


def config() -> ConfigDict:
    """A byte LM with one block, attention and MoE; fixed here, so that no change to a base config touches it."""
    mixer = {"kind": "attention", "num_heads": 2, "num_kv_heads": 1}
    norm = {"kind": "rms_norm"}
    moe = {
        "kind": "moe",
        "num_experts": 4,
        "router": {"kind": "linear"},
        "select": {"kind": "top_k", "k": 2, "capacity_factor": 1.25},
        "bank": {"kind": "glu", "hidden": 32},
        "losses": {"balance": {"coef": 0.01}, "z": {"coef": 1e-3}},
    }
    blocks = {"moe": {"kind": "transformer", "mixer": mixer, "norm": norm, "ffn": moe}}
    return ConfigDict(
        {
            "model": {
                "kind": "decoder_lm",
                "vocab_size": 256,
                "d_model": 16,
                "num_layers": 1,
                "pattern": ("moe",),
                "blocks": blocks,
            },
            # Prose only: the other domains are the interpreter's own files and differ between Python versions.
            "data": {"name": "embedded_text", "batch_size": 4, "seq_len": 32, "domains": ("literature",)},
            "task": {"kind": "next_token"},
            "optimizer": {"kind": "adamw", "learning_rate": 1e-3, "warmup_steps": 1, "schedule": "cosine"},
            "train": {"steps": STEPS, "log_every": 1},
            "eval": {"every": 0, "batches": 1},
            "checkpoint": {"every": 0},
        }
    )


def platform_key() -> str:
    """What numbers may depend on besides the sources."""
    import jax

    device = jax.devices()[0]
    where = environment.machine() if device.platform == "cpu" else device.device_kind
    return f"jax {jax.__version__}, {device.platform}, {where}"


def sources_hash() -> str:
    """Hash of every source file of the library and of the versions of what it computes with."""
    digest = hashlib.sha256()
    for package in ("moejax", "pallas_kernels"):
        for file in sorted((environment.REPOSITORY / package).rglob("*.py")):
            digest.update(file.relative_to(environment.REPOSITORY).as_posix().encode() + file.read_bytes())
    digest.update(" ".join(importlib.metadata.version(name) for name in PACKAGES).encode())
    digest.update(json.dumps(config().to_dict(), sort_keys=True).encode())
    return digest.hexdigest()[:20]


def _losses(runs: Path, fit: Callable[..., Any], say: Callable[[str], None]) -> list[float]:
    """The training losses, from the last time these very sources ran on this platform, or from running them."""
    kept = runs / "canary.json"
    what = {"sources": sources_hash(), "platform": platform_key()}
    found: dict[str, Any] = {}
    if kept.exists():
        try:
            found = read_sealed(kept)
        except ValueError as damage:
            set_aside(kept, "canary", str(damage))
    if {k: found.get(k) for k in what} == what:
        return found["losses"]
    say("sources changed: repeating the canary, a training of a few steps")
    with tempfile.TemporaryDirectory() as folder:
        result = fit(config(), seed=0, workdir=folder, progress=lambda progress: None, label="canary")
    losses = [float(row["train/loss"]) for row in result.history if "train/loss" in row]
    write_sealed(kept, {**what, "losses": losses})
    return losses


def _known(record: Path) -> dict[str, Any]:
    if not record.exists():
        return {}
    try:
        known = json.loads(record.read_text())
    except ValueError:
        known = None
    if not isinstance(known, dict):
        raise ConfigError(f"{record} cannot be read; take it from the repository, or remove it to record the numbers anew")
    return known


def _trusted(known: dict[str, Any], name: str, record: Path) -> dict[str, Any] | None:
    """What was recorded under a name, or None: numbers that others are held against are not quietly made again."""
    try:
        return unseal(known[name]) if name in known else None
    except ValueError as damage:
        raise ConfigError(
            f"{record.name} ({name}) is damaged ({damage}); take it from the repository, or record the numbers with "
            "--accept_numerics"
        ) from None
