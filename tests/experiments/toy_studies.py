"""A study and a trainer that need no training: the trainer's numbers are made up from the config and the seed."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from configs import base_lm
from experiments.cache import Run
from experiments.departures import Departures
from experiments.study import Arm, Preset, Study, higher, lower

# What the made-up trainer adds to a final loss for each experts-per-token, so that every verdict can be arranged.
SOURCE = '''"""A toy study, found by its file's name."""

from toy_studies import make_study

STUDY = make_study("{slug}")
'''


def make_study(slug: str = "toy", **changes: Any) -> Study:
    """Three arms, one ablation, three claims."""
    fields: dict[str, Any] = {
        "slug": slug,
        "title": "A toy: mixtures against dense",
        "arxiv": "2101.03961",
        "base": _base(),
        "arms": (
            Arm("dense", {"model.pattern": ("dense", "dense")}, note="equal FLOPs per token"),
            Arm("switch"),
            Arm("top2", {"model.blocks.moe.ffn.select.k": 2}),
        ),
        "ablations": {"capacity": (Arm("roomy", {"model.blocks.moe.ffn.select.capacity_factor": 2.0}),)},
        "claims": (
            lower(
                "eval/bits_per_byte",
                "switch",
                "dense",
                matched=("flops",),
                text="Switch beats dense at equal compute",
                headline=True,
            ),
            higher("eval/accuracy", "top2", "switch", by=0.5, matched=()),
            lower("eval/bits_per_byte", "roomy", "switch", text="drops cost quality", matched=()),
        ),
        "presets": {
            "smoke": Preset({"train.steps": 4}, looks=(1,), headline_looks=(1,)),
            "cpu": Preset({"train.steps": 100}),
            "paper": Preset({"train.steps": 1000}),
        },
        "departures": Departures(
            scale="a tenth of the steps",
            method="none",
            left_out="translation",
            capacity="none",
            optimizer="none",
            decay="none",
            init="none",
        ),
    }
    return Study(**{**fields, **changes})


def _base() -> ConfigDict:
    """With room for an even share, so that a mixture of one expert a token computes what the dense model does."""
    config = base_lm.get_config()
    config.model.blocks.moe.ffn.select.capacity_factor = 1.0
    return config


@dataclasses.dataclass
class Report:
    """What the trainer says while it trains; the fields of `moejax.train.Progress`."""

    label: str
    step: int
    steps: int
    phase: str
    tokens_per_second: float
    loss: float | None
    seconds_left: float | None


@dataclasses.dataclass
class Result:
    """What the trainer returns; the fields of `moejax.train.RunResult` that are kept."""

    metrics: dict[str, float]
    history: list[dict[str, Any]]
    steps: int
    seconds: float = 12.5
    first_step_seconds: float = 1.5
    params: int = 1_234_567
    active_params: int = 345_678
    trainable_params: int = 1_234_567
    flops_per_step: float = 1e9
    tokens_per_step: int = 1024
    state_bytes: int = 4_000_000


class FakeFit:
    """Writes the files that `moejax.train.fit` writes, at once. `calls` lists the (label, seed) that were trained."""

    def __init__(self, final: Callable[[ConfigDict, int], float] | None = None):
        self.final = final or final_bits
        self.calls: list[tuple[str, int]] = []

    def __call__(
        self,
        config: ConfigDict,
        seed: int,
        workdir: str,
        progress: Callable[[Report], None],
        label: str,
        resolve: Callable[..., Path] | None = None,
    ) -> Result:
        init = config.get("init") or {}
        for place, source in {"source": init.get("source", {}), **(init.get("others") or {})}.items():
            if "config" in source:
                own = source.get("seed", "own") == "own"
                resolve(source["config"], seed if own else source["seed"], progress, f"init.{place} of {label}")
        self.calls.append((label, seed))
        folder, steps, end = Path(workdir), int(config.train.steps), self.final(config, seed)
        folder.mkdir(parents=True, exist_ok=True)
        history = []
        every = max(steps // 25, 1)
        for step in range(every, steps + 1, every):
            bits = end + 3 * math.exp(-6 * step / steps) * (1 + 0.05 * math.sin(step + seed))
            row: dict[str, Any] = {"step": step, "train/loss": bits * math.log(2)}
            if "moe" in config.model.pattern:
                row |= _stats(config, seed)
            if step % (every * 5) == 0 or step + every > steps:
                last = step + every > steps
                row |= {"eval/bits_per_byte": end if last else bits, "eval/accuracy": accuracy(config, seed)}
            history.append(row)
            progress(Report(label, step, steps, "train", 1e4, row["train/loss"], float(steps - step)))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history))
        timing = {"step": steps, "seconds": 12.5, "tokens_per_second": 10_000.0 + seed}
        (folder / "timings.jsonl").write_text(json.dumps(timing) + "\n")
        return Result({"eval/bits_per_byte": end, "eval/accuracy": accuracy(config, seed)}, history, steps)


def final_bits(config: ConfigDict, seed: int) -> float:
    """Dense 2.0; a mixture 1.9, less 0.05 for each further expert per token; a little noise."""
    noise = 0.01 * math.sin(7 * seed + 1)
    if "moe" not in config.model.pattern:
        return 2.0 + noise
    return 1.95 - 0.05 * config.model.blocks.moe.ffn.select.k + 0.5 * noise


def accuracy(config: ConfigDict, seed: int) -> float:
    """About a half, whatever the model."""
    return 0.5 + 1e-3 * math.sin(5 * seed + final_bits(config, seed))


def make_runs(**arms: list[float]) -> dict[str, dict[int, Run]]:
    """Runs with metric 'm': one value per seed of each arm."""
    return {arm: {seed: Run(arm, seed, {"m": v}) for seed, v in enumerate(values)} for arm, values in arms.items()}


def _stats(config: ConfigDict, seed: int) -> dict[str, Any]:
    experts = config.model.blocks.moe.ffn.num_experts
    rng = np.random.default_rng(seed)
    stats: dict[str, Any] = {"stats/drop_rate": 0.02}
    for layer in range(2):
        load = rng.dirichlet(np.full(experts, 4.0 * (layer + 1)))
        stats |= {f"stats/stack.repeats.1_moe.ffn.{layer}/load": load.tolist()}
    return stats
