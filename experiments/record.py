"""The outcome of a study and what is written of it: all results, and the small ledger entry that is kept in the repository.

A ledger entry is written by the runner, and only of a run that is complete: a preset of scale, every arm, seeds until every claim is
decided or its looks are spent, nothing overridden. It depends on the finished runs alone, so that writing it twice changes nothing.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments import seeds as seeding
from experiments.cache import SIZES, Run
from experiments.overrides import PLACE
from experiments.study import Claim, Study
from experiments.verdict import Verdict, summary
from moejax.core.errors import ConfigError
from moejax.core.files import write_json

LEDGER = Path(__file__).parent / "ledger"
LEDGER_PRESETS = ("cpu", "paper")
# Shown and kept for every study that measures them, whatever its claims name.
ALWAYS = ("eval/bits_per_byte", "eval/accuracy", "eval/loss")


@dataclass(frozen=True)
class Outcome:
    """What a study's run gave: `runs[arm][seed]` and `configs[arm]`, in the order of the arms.

    `overrides` are those of the command line, dotted key -> value; `fixed` is its number of seeds, if it gave one; `baselines` are what
    is reached without a network on the data of the first arm, see `experiments.baselines`.
    """

    study: Study
    preset: str
    ablation: str
    runs: Mapping[str, Mapping[int, Run]]
    configs: Mapping[str, ConfigDict]
    overrides: Mapping[str, Any] = field(default_factory=dict)
    fixed: int | None = None
    baselines: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @cached_property
    def verdicts(self) -> tuple[Verdict, ...]:
        """The verdict on every claim whose arms have run."""
        return seeding.verdicts(self.study, self.preset, self.runs, self.fixed)

    @property
    def unjudged(self) -> tuple[Claim, ...]:
        """Claims whose arms have not all run."""
        return tuple(claim for claim in self.study.claims if not set(claim.arms) <= set(self.runs))

    @property
    def missing(self) -> str:
        """Why this is no complete run of its preset; empty if it is one."""
        absent = [arm.name for arm in self.study.group(self.ablation) if arm.name not in self.runs]
        if self.preset not in LEDGER_PRESETS:
            return f"preset '{self.preset}' checks the machinery, not the claims"
        changes = [key for key in self.overrides if key.split(".")[0] not in PLACE]
        if changes:
            return f"--config.{changes[0]} changes the study"
        if absent:
            return f"without arm {', '.join(absent)}"
        if self.fixed:
            return f"--seeds={self.fixed} is a look of its own, and not those that the preset declares"
        if todo := seeding.next_runs(self.study, self.preset, list(self.runs), self.runs):
            return f"{len(todo)} runs are still to come"
        return ""

    @property
    def skipped(self) -> tuple[str, ...]:
        """Arms of the study that this run left out: those of other ablations."""
        return tuple(name for name in self.study.every_arm if name not in self.runs)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that matter: the study's, its claims', and the usual ones, as far as they were measured."""
        named = (*self.study.metrics, *(m for claim in self.study.claims for m in claim.quantity.metrics), *ALWAYS)
        found = [run for seeds in self.runs.values() for run in seeds.values()]
        return tuple(m for m in dict.fromkeys(named) if any(run.matching(m) for run in found))

    @property
    def name(self) -> str:
        """`cpu`, or `cpu-capacity` with an ablation: a part of file names."""
        return f"{self.preset}-{self.ablation}" if self.ablation else self.preset


def results(outcome: Outcome) -> dict[str, Any]:
    """Everything that was measured, per arm and seed, and the verdicts."""
    arms = {
        arm: {str(seed): {"metrics": dict(run.metrics), "path": str(run.path), **run.meta} for seed, run in seeds.items()}
        for arm, seeds in outcome.runs.items()
    }
    return plain({**_head(outcome), "overrides": dict(outcome.overrides), "arms": arms, "claims": _claims(outcome)})


def entry(outcome: Outcome) -> dict[str, Any]:
    """The ledger entry: verdicts, and per arm the mean, standard deviation and values of the metrics that matter."""
    names = dict.fromkeys((*outcome.metrics, "stats/drop_rate", *SIZES))
    arms: dict[str, dict[str, Any]] = {}
    for arm, seeds in outcome.runs.items():
        arms[arm] = {}
        for name in names:
            values = tuple(run.value(name) for run in seeds.values() if run.matching(name))
            if values:
                mean, std = summary(values)
                arms[arm][name] = {"mean": mean, "std": std, "values": list(values)}
    rest = {"claims": _claims(outcome), "arms": arms, "baselines": outcome.baselines}
    return plain({**_head(outcome), "skipped_arms": list(outcome.skipped), **rest})


def write_entry(outcome: Outcome, folder: Path) -> Path:
    """Writes the ledger entry of a complete outcome and returns its path.

    Raises:
      ValueError: the outcome is not complete.
    """
    if outcome.missing:
        raise ValueError(f"no ledger entry for {outcome.study.slug}: {outcome.missing}")
    path = folder / entry_name(outcome.study.slug, outcome.preset, outcome.ablation)
    write_json(path, entry(outcome), indent=1)
    return path


def entry_name(slug: str, preset: str, ablation: str) -> str:
    """`switch.json`; the paper's scale and ablations have files of their own beside it."""
    parts = [slug, *([preset] if preset != "cpu" else []), *([ablation] if ablation else [])]
    return ".".join([*parts, "json"])


def entries(*folders: Path) -> list[dict[str, Any]]:
    """Every entry of some ledgers (of the repository's, if none is named), sorted by study and preset; a later ledger's takes the place of
    an earlier one's. One whose numbers a change of the library has overtaken says so in 'outdated', until the study is run anew."""
    files = {file.name: file for folder in folders or (LEDGER,) for file in sorted(folder.glob("*.json"))}
    found = [read_entry(file) for name, file in files.items() if name != "canary.json"]
    return sorted(found, key=lambda e: (e["slug"], e["preset"], e["ablation"]))


def read_entry(file: Path) -> dict[str, Any]:
    """A ledger entry, with nan where it says null: a number that was not finite, see `plain`.

    Raises:
      ConfigError: it cannot be read.
    """
    try:
        found = json.loads(file.read_text())
        return _numeric({**found, **{name: found[name] for name in ("slug", "preset", "ablation", "claims", "arms")}})
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{file} is no ledger entry ({error}); take it from the repository, or run its study again") from None


def ledger_folder(runs: Path, recorded: bool = False) -> Path:
    """Where entries go: beside the runs, or into the repository's ledger if the results are to be recorded for all.

    Raises:
      ConfigError: the repository cannot be written.
    """
    if recorded and not os.access(LEDGER.parent, os.W_OK):
        raise ConfigError(
            f"--record writes {LEDGER}, which cannot be written; run without it, entries then go to {runs / 'ledger'}"
        )
    return LEDGER if recorded else runs / "ledger"


def plain(value: Any) -> Any:
    """The value as strict JSON can hold it: a number that is not finite becomes null."""
    match value:
        case Mapping():
            return {k: plain(v) for k, v in value.items()}
        case list() | tuple():
            return [plain(v) for v in value]
        case float() if not math.isfinite(value):
            return None
    return value


def _numeric(value: Any) -> Any:
    match value:
        case dict():
            return {k: _numeric(v) for k, v in value.items()}
        case list():
            return [_numeric(v) for v in value]
        case None:
            return math.nan
    return value


def _head(outcome: Outcome) -> dict[str, Any]:
    study = outcome.study
    runs = [run for seeds in outcome.runs.values() for run in seeds.values()]

    def seen(name: str) -> list[str]:
        return sorted({run.meta[name] for run in runs if name in run.meta})

    return {
        "slug": study.slug,
        "title": study.title,
        "arxiv": study.arxiv,
        "preset": outcome.preset,
        "ablation": outcome.ablation,
        # Runs come from the cache too, so there may be several of each.
        "commit": ", ".join(seen("commit")),
        "device": ", ".join(seen("device")),
        "jax": ", ".join(seen("jax")),
        "date": max(seen("date"), default=""),
        # Of the arm that has most; every arm has values for its own.
        "seeds": max((len(seeds) for seeds in outcome.runs.values()), default=0),
        "steps": {arm: int(outcome.configs[arm].train.steps) for arm in outcome.runs},
    }


def _claims(outcome: Outcome) -> list[dict[str, Any]]:
    return [
        {
            "claim": v.claim.sentence,
            "statement": v.claim.statement,
            "headline": v.claim.headline,
            "matched": list(v.claim.matched or ()),
            "looks": list(seeding.looks_at(outcome.study, outcome.preset, v.claim, outcome.fixed)),
            "verdict": v.word,
            "reason": v.reason,
            "mean": v.mean,
            "std": v.std,
            "interval": list(v.interval),
            "evaluation_error": v.block_error,
            "values": list(v.values),
        }
        for v in outcome.verdicts
    ]
