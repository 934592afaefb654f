"""The tables of a study's outcome, as rows of text that the terminal and the HTML report both show."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from experiments import departures, overrides
from experiments.cache import Run
from experiments.catalog import Row
from experiments.record import ALWAYS, Outcome
from experiments.study import Arm, Claim, Preset, Study, resolve, unresolved
from experiments.verdict import CONSTRUCTED, INCONCLUSIVE, NOT_MATCHED, NOT_REPRODUCED, OUT_OF_REACH, REPRODUCED, WORDS, summary

COLOURS = {
    REPRODUCED: "green",
    NOT_REPRODUCED: "red",
    INCONCLUSIVE: "yellow",
    NOT_MATCHED: "yellow",
    CONSTRUCTED: "dim",
    OUT_OF_REACH: "dim",
}
SIZES = (("params", "params"), ("active", "active_params"), ("steps", "steps"), ("tokens/s", "tokens_per_second"))
LEARNING = "trainable_params"
DROPS = "stats/drop_rate"
KEYS = 3  # of each suspect, that a table of departures shows
BACKENDS = "stats/*/backend"
# What a column or the last part of a metric's name says, and its unit.
MEANINGS = {
    "loss": "what is minimised without the losses on routing, nats a token or image",
    "bits_per_byte": "cross entropy, bits for a byte of text",
    "perplexity": "exponential of the cross entropy in nats a token",
    "accuracy": "share of right answers, 0 to 1",
    "params": "parameters in all",
    "active": "parameters that a token uses",
    "learning": "parameters that are trained",
    "tokens/s": "tokens (or images) trained on in a second",
    "drop_rate": "share of the wanted pairs of token and expert that were refused for lack of capacity, 0 to 1 (eval/: in the last evaluation, else in the last logged step of training)",
    "backend": "how plans were executed, see `moejax.dispatch`",
    "max_violation": "load of the most loaded expert over an even share, less 1",
    "load_entropy": "entropy of the load over experts, nats",
    "experts_per_token": "experts that a token was processed by, on average",
    "entropy": "of a token's distribution over experts, nats",
    "z": "mean squared logarithm of the router's partition function",
    "balance": "1 if all experts are used alike, 0 if one takes everything",
    "experts/token": "experts that a token was processed by, on average",
    "entropy, bits": "of a token's distribution over experts",
    "specialisation": "share of the label (domain, class) that a token's expert tells",
    "alike": "mean cosine of two experts' answers to the same token",
    "under noise": "share of choices that change when other tokens are replaced",
    "changed": "share of choices that changed since the checkpoint before",
}


@dataclass(frozen=True)
class Table:
    """A title, column names and rows of text; `styles` has a colour name per row, or ''; `notes` say what columns mean."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    styles: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def arms(outcome: Outcome) -> Table:
    """One row an arm: the metrics that matter as mean ± standard deviation over seeds, sizes, speed, drops."""
    metrics = [m for m in outcome.metrics if m not in {name for _, name in SIZES} | {DROPS, LEARNING}]
    runs = [run for seeds in outcome.runs.values() for run in seeds.values()]
    part = any(run.matching(LEARNING) and run.value(LEARNING) != run.value("params") for run in runs)
    sizes = [*SIZES[:2], *([("learning", LEARNING)] if part else []), *SIZES[2:]]
    drops = any(run.matching(DROPS) for run in runs)
    backends = any(backend_of(run) for run in runs)
    rows = []
    for arm, seeds in outcome.runs.items():
        cached = sum(run.cached for run in seeds.values())
        rows.append(
            (
                arm,
                f"{len(seeds)}" + (f" ({cached} cached)" if cached else ""),
                *(spread(_values(seeds, metric)) for metric in metrics),
                *(quantity(_mean(seeds, metric)) for _, metric in sizes),
                *([spread(_values(seeds, DROPS))] if drops else []),
                *([", ".join(dict.fromkeys(filter(None, map(backend_of, seeds.values())))) or "-"] if backends else []),
            )
        )
    for name, scores in outcome.baselines.items():
        if any(metric in scores for metric in metrics):
            reached = (number(scores[metric]) if metric in scores else "-" for metric in metrics)
            rows.append((f"({name})", "-", *reached, *["-"] * (len(sizes) + drops + backends)))
    columns = ("arm", "seeds", *metrics, *(title for title, _ in sizes), *(["drop_rate"] if drops else []))
    columns += ("backend",) if backends else ()
    notes = legend(columns) + (
        ("in brackets: what is reached without a network on the same data",) if outcome.baselines else ()
    )
    return Table("Arms (mean ± standard deviation over seeds)", columns, tuple(rows), notes=notes)


def legend(columns: Sequence[str]) -> tuple[str, ...]:
    """A line for each meaning in `MEANINGS`, with the columns that have it: by their own name, or the last part of a metric's."""
    found: dict[str, list[str]] = {}
    for column in columns:
        name = next((name for name in (column, column.rpartition("/")[2]) if name in MEANINGS), "")
        if name:
            found.setdefault(MEANINGS[name], []).append(column)
    return tuple(f"{', '.join(names)}: {meaning}" for meaning, names in found.items())


def backend_of(run: Run) -> str:
    """The names of the backends that a run's layers were executed by, which its logs have as numbers; '' if none says."""
    from moejax.dispatch import BACKENDS as NAMES
    from moejax.dispatch import backend_name

    found = [value for name in (f"eval/{BACKENDS}", BACKENDS) for value in run.matching(name)]
    return ", ".join(dict.fromkeys(backend_name(value) for value in found if value in range(len(NAMES))))


def claims(outcome: Outcome) -> Table:
    """One row a claim that could be judged: effect, interval, seeds, the evaluation set's part of the error, verdict.

    Each end of the interval errs in 5 % of cases, over all looks.
    """
    rows, styles = [], []
    for verdict in outcome.verdicts:
        claim = verdict.claim
        low, high = verdict.interval
        rows.append(
            (
                _starred(claim),
                claim.statement if claim.text else "",
                number(verdict.mean),
                "-" if math.isnan(low) else f"[{number(low)}, {number(high)}]",
                str(len(verdict.seeds)),
                "-" if math.isnan(verdict.block_error) else number(verdict.block_error),
                verdict.word + (f": {verdict.reason}" if verdict.reason else ""),
            )
        )
        styles.append(COLOURS[verdict.word])
    columns = ("claim (★ headline)", "statement", "measured", "interval", "seeds", "evaluation", "verdict")
    return Table("Claims", columns, tuple(rows), tuple(styles))


def summary_of(name: str, runs: Mapping[int, Run]) -> Table:
    """The evaluation, sizes and speed of one config, over its seeds."""
    first = next(iter(runs.values()))
    scores = [m for m in first.metrics if m == "train/loss" or (m.startswith("eval/") and "stats/" not in m)]
    rows = [(metric, spread(_values(runs, metric))) for metric in scores]
    rows += [(title, quantity(_mean(runs, metric))) for title, metric in SIZES]
    rows += [("drop_rate", spread(_values(runs, DROPS)))] if first.matching(DROPS) else []
    rows += [("backend", backend_of(first))] if backend_of(first) else []
    rows += [("time", duration(_mean(runs, "seconds"))), ("time to first step", duration(_mean(runs, "first_step_seconds")))]
    return Table(
        f"{name}, {len(runs)} seed{'' if len(runs) == 1 else 's'}",
        ("metric", "value"),
        tuple(rows),
        notes=legend([name for name, _ in rows]),
    )


def adapted(name: str, layers: Sequence[Any]) -> Table:
    """What the adapters of an arm sit around, `moejax.layers.adapters.AdaptedLayer`s."""
    from moejax.layers.adapters.table import COLUMNS, cells

    return Table(f"Adapters of {name}", COLUMNS, cells(layers))


def methods(rows: Sequence[Row], entries: Sequence[Mapping[str, Any]]) -> Table:
    """The catalogue's rows, with the verdicts that the ledger's entries hold."""
    cells = []
    for row in rows:
        verdicts = count_verdicts([entry for entry in entries if entry["slug"] == row.slug])
        cells.append((row.slug, row.title, row.family, str(row.year), verdicts, row.status))
    styles = tuple("dim" if row.status == "card" else "green" for row in rows)
    return Table("", ("method", "title", "family", "year", "verdicts", "status"), tuple(cells), styles)


def describe(study: Study) -> tuple[Table, ...]:
    """A study's arms, what they start from, claims, presets and departures from its paper."""
    groups = [("", study.arms), *study.ablations.items()]
    arms = tuple(
        (arm.name, group, arm.note, ", ".join(arm.overrides) or "the base") for group, found in groups for arm in found
    )
    begins = tuple(
        row for group in (study.starts, *(found for _, found in groups)) for arm in group for row in _begins(study, arm)
    )
    claims = tuple((_starred(c), c.statement, _matched(c), c.needs) for c in study.claims)
    first = study.arms[0].name
    presets = tuple((name, _looks(p), str(resolve(study, name, first).train.steps)) for name, p in study.presets.items())
    return (
        Table("Arms", ("arm", "ablation", "note", "changes"), arms),
        *((Table("Starts", ("arm", "starts from", "then", "learns"), begins),) if begins else ()),
        Table("Claims", ("claim (★ headline)", "statement", "matched", "needs"), claims),
        Table("Presets", ("preset", "seeds", f"steps of {first}"), presets),
        *departed(study),
    )


def departed(study: Study) -> tuple[Table, ...]:
    """What a study does otherwise than its paper, and which keys tell it; nothing for a study that no paper has."""
    if study.departures is None:
        return ()
    sides = [{arm: resolve(study, name, arm) for arm in study.every_arm} for name in ("cpu", "paper") if name in study.presets]
    found = departures.differences(*sides) if len(sides) == 2 else {}
    rows = tuple(
        (
            suspect.replace("_", " "),
            sentence,
            "; ".join(f"{d.key} {d.cpu!r} -> {d.paper!r}" for d in found.get(suspect, ())[:KEYS]),
        )
        for suspect, sentence in study.departures.items()
    )
    return (Table("Departures from the paper", ("what", "otherwise than the paper", "such as, at cpu -> at paper"), rows),)


def _matched(claim: Claim) -> str:
    """`flops, params`; '-' of a claim about one arm."""
    return "-" if claim.matched is None else ", ".join(claim.matched) or "nothing"


def _looks(preset: Preset) -> str:
    """`4, 6 (headline 4, 6, 9, 13)`."""
    plain, headline = (", ".join(map(str, looks)) for looks in (preset.looks, preset.headline_looks))
    return plain if plain == headline else f"{plain} (headline {headline})"


def _begins(study: Study, arm: Arm) -> Iterator[tuple[str, str, str, str]]:
    """What an arm starts from and what of it learns; no row for one that starts from nothing and learns all."""
    config = unresolved(study, next(iter(study.presets)), arm.name)
    init = {**overrides.BEGIN["init"], **config.init}
    rules = {name: rule for name, rule in config.trainable.items() if rule is not None}
    sources = {"": init["source"], **{f"{name}: ": source for name, source in init["others"].items() if source is not None}}
    sources |= {
        f"task.{name}: ": value for name, value in config.task.items() if isinstance(value, ConfigDict) and "kind" in value
    }
    adapters = tuple(f"{name} ({spec.kind})" for name, spec in config.adapters.items() if spec is not None)
    surgeries = tuple(init["order"]) or tuple(init["surgeries"])
    if arm in study.starts or rules or len(sources) > 1 or surgeries or adapters or init["source"]["kind"] != "fresh":
        steps = (*surgeries, *adapters)
        told = "; ".join(f"{name}{_source(spec)}" for name, spec in sources.items())
        yield arm.name, told, ", ".join(steps) or "-", "; ".join(_rule(*rule) for rule in rules.items()) or "everything"


def _source(spec: Mapping[str, Any] | ConfigDict) -> str:
    """`arm dense (own seed)`, `checkpoint runs/x`, `nothing`."""
    seed = {"own": "own seed"}.get(spec.get("seed", "own"), f"seed {spec.get('seed')}")
    if "arm" in spec:
        return f"arm {spec.arm}" + (f" of {spec.study}" if "study" in spec else "") + f" ({seed})"
    if "config" in spec:
        return f"a run of {spec.config.train.steps} steps ({seed})"
    return "nothing" if spec["kind"] == "fresh" else f"{spec['kind']} {spec.get('path', '')}".strip()


def _rule(name: str, rule: ConfigDict) -> str:
    """`norms x 0.1 from 100 to 200`."""
    rate = f" x {rule.rate:g}" if rule.get("rate", 1) != 1 else ""
    since = f" from {rule.since}" if rule.get("since") else ""
    until = f" to {rule.until}" if rule.get("until") is not None else ""
    return f"{name}{rate}{since}{until}"


def count_verdicts(entries: Sequence[Mapping[str, Any]]) -> str:
    """`3 reproduced, 1 inconclusive` over all claims of some ledger entries."""
    words = [claim["verdict"] for entry in entries for claim in entry["claims"]]
    return ", ".join(f"{words.count(word)} {word}" for word in WORDS if word in words)


def ending(run: Run) -> str:
    """How a run ended, for its line of progress: its first evaluation metric, time and speed."""
    score = next((f"{m} {run.value(m):.4f}" for m in ALWAYS if run.matching(m)), "")
    speed = f"{run.value('tokens_per_second'):,.0f} tokens/s" if run.matching("tokens_per_second") else ""
    time = duration(run.value("seconds")) if run.matching("seconds") else ""
    state = "diverged" if run.diverged else "cached" if run.cached else "done"
    return "  ".join(filter(None, (score, speed, time, state)))


def number(value: float) -> str:
    """Four significant digits."""
    return "-" if math.isnan(value) else f"{value:.4g}"


def spread(values: tuple[float, ...]) -> str:
    """`1.846 ± 0.012`, with as many decimals as the spread supports."""
    mean, std = summary(values)
    if not math.isfinite(mean):
        return "-" if math.isnan(mean) else f"{mean}"
    if math.isnan(std) or std == 0:
        return f"{mean:.4g}" + ("" if math.isnan(std) else " ± 0")
    decimals = min(max(1 - math.floor(math.log10(std)), 0), 6)
    return f"{mean:.{decimals}f} ± {std:.{decimals}f}"


def quantity(value: float) -> str:
    """1234567 -> '1.23M'; small whole numbers as they are."""
    if not math.isfinite(value):
        return "-" if math.isnan(value) else f"{value}"
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 10 or (abs(value) >= size and size > 1e3):
            return f"{value / size:.3g}{letter}"
    return f"{value:.0f}"


def percent(value: float) -> str:
    """0.0123 -> '1.2 %'."""
    return "-" if math.isnan(value) else f"{100 * value:.1f} %"


def duration(seconds: float) -> str:
    """45 -> '45 s', 125 -> '2 min 05 s', 7500 -> '2 h 05 min'; '-' if it was not measured."""
    if not math.isfinite(seconds):
        return "-"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def _values(seeds: Mapping[int, Run], metric: str) -> tuple[float, ...]:
    return tuple(run.value(metric) for run in seeds.values())


def _mean(seeds: Mapping[int, Run], metric: str) -> float:
    return summary(_values(seeds, metric))[0]


def _starred(claim: Claim) -> str:
    return ("★ " if claim.headline else "") + claim.sentence
