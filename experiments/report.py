"""What a study leaves for readers: results as JSON, plots, one HTML file that needs nothing else, and an index of all studies."""

import base64
import html
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import plots, record, tables
from experiments.overrides import apply, copy, flatten
from experiments.record import Outcome
from experiments.tables import Table
from experiments.terminal import SHORT
from experiments.verdict import OUT_OF_REACH
from moejax.core.files import write_atomically, write_json

STYLE = """
:root { --ink: #1b1f24; --soft: #5a6370; --line: #dfe3e8; --paper: #ffffff; --wash: #f6f7f9; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #9aa4b0; --line: #333a43; --paper: #16191d; --wash: #1e2329; } }
body { margin: 2.5rem auto; max-width: 84rem; padding: 0 1.5rem; background: var(--paper); color: var(--ink);
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .3rem } h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem }
p.facts, p.note { color: var(--soft); margin: .2rem 0 } p.note { font-size: .8rem; margin: 0 } a { color: #0b6bcb }
.scroll { overflow-x: auto; max-width: 100% } table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .4rem .7rem .4rem 0; border-bottom: 1px solid var(--line); vertical-align: top; overflow-wrap: break-word }
th { color: var(--soft); font-weight: 600; vertical-align: bottom } td.short { white-space: nowrap } td.long { min-width: 11rem }
code, pre { font: .86rem/1.45 ui-monospace, "SF Mono", Menlo, Consolas, monospace }
pre { background: var(--wash); padding: 1rem; overflow-x: auto; border-radius: 6px }
img { max-width: 100%; background: #ffffff; border-radius: 6px }
.headline { border-left: 4px solid; padding: .6rem 1rem; margin: 1.4rem 0; background: var(--wash) }
.green { color: #1a7f37 } .red { color: #cf222e } .yellow { color: #9a6700 } .dim { color: var(--soft) }
@media (prefers-color-scheme: dark) { .green { color: #56d364 } .red { color: #ff7b72 } .yellow { color: #e3b341 } }
"""


@dataclass(frozen=True)
class Written:
    """Paths of what was written for one outcome; `tensorboard` is the folder to give to TensorBoard."""

    html: Path
    results: Path
    plots: tuple[Path, ...]
    tensorboard: Path


def write(outcome: Outcome, runs: Path) -> Written:
    """Writes everything under `<runs>/reports/<slug>/<preset>/` and refreshes nothing else."""
    folder = runs / "reports" / outcome.study.slug / outcome.name
    drawn = (
        plots.curves(outcome, folder / "curves.png"),
        plots.ranking(outcome, folder / "ranking.png"),
        plots.loads(outcome, folder / "load.png"),
    )
    pictures = (*(path for path in drawn if path), *_analysed(outcome, folder))
    write_json(folder / "results.json", record.results(outcome), indent=1)
    write_atomically(folder / "report.html", page(outcome, pictures))
    return Written(folder / "report.html", folder / "results.json", pictures, _link_events(outcome, folder / "tensorboard"))


def page(outcome: Outcome, pictures: Iterable[Path]) -> str:
    """The report of one outcome as one HTML file."""
    study = outcome.study
    entry = record.entry(outcome)
    seeds = f"{entry['seeds']} seed{'' if entry['seeds'] == 1 else 's'}"
    facts = [
        f"preset {outcome.preset}",
        seeds,
        entry["date"],
        entry["device"],
        f"jax {entry['jax']}",
        f"commit {entry['commit']}",
    ]
    if outcome.ablation:
        facts.insert(1, f"ablation {outcome.ablation}")
    paper = f'<a href="https://arxiv.org/abs/{_e(study.arxiv)}">arXiv {_e(study.arxiv)}</a> · ' if study.arxiv else ""
    parts = [
        f'<h1>{_e(study.title)}</h1><p class="facts">{paper}{_e(" · ".join(f for f in facts if f))}</p>',
        _headline(outcome),
        _section("Claims", _table(tables.claims(outcome)) + _unjudged(outcome)),
        _section(tables.arms(outcome).title, _table(tables.arms(outcome)) + _diverged(outcome)),
        *(_section(_PICTURES[path.stem], _image(path)) for path in pictures),
        _section("Configurations: what each arm changes", _table(differences(outcome)) + _notes(outcome)),
        *(_section(table.title, _table(table)) for table in tables.departed(study)),
        _section("Record", f"<p>{_e(_ledger_line(outcome))}</p>" + _json(entry)),
    ]
    return _document(f"{study.title}: {outcome.preset}", "\n".join(parts))


def write_index(ledgers: Sequence[Path], runs: Path) -> Path:
    """Writes `<runs>/reports/index.html`: every ledger entry with its verdicts, linked to its report where there is one."""
    folder = runs / "reports"
    columns = ("study", "preset", "headline claim", "verdict", "all claims", "seeds", "date", "device")
    rows, styles, links = [], [], []
    for entry in record.entries(*ledgers):
        headline = next((c for c in entry["claims"] if c["headline"]), {"claim": "-", "verdict": OUT_OF_REACH, "reason": ""})
        name = "-".join(filter(None, (entry["preset"], entry["ablation"])))
        report = folder / entry["slug"] / name / "report.html"
        links.append(f"{entry['slug']}/{name}/report.html" if report.exists() else "")
        verdict = headline["verdict"] + (f": {headline['reason']}" if headline["reason"] else "")
        counts = tables.count_verdicts([entry])
        cells = (entry["title"], name, headline["claim"], verdict, counts, str(entry["seeds"]), entry["date"], entry["device"])
        rows.append(cells)
        styles.append(tables.COLOURS[headline["verdict"]])
    table = Table("Studies", columns, tuple(rows), tuple(styles))
    body = "<h1>Studies</h1>" + (_table(table, links, verdict_column=3) if rows else "<p>No ledger entry yet.</p>")
    body += _other_reports(folder, set(links))
    write_atomically(folder / "index.html", _document("moejax: studies", body))
    return folder / "index.html"


def differences(outcome: Outcome) -> Table:
    """One row per config key in which an arm differs from the preset's base."""
    study = outcome.study
    base = copy(study.base)
    apply(base, study.preset(outcome.preset).overrides, "preset")
    apply(base, outcome.overrides, "command line")
    before = flatten(base)
    rows = []
    for arm in outcome.runs:
        after = flatten(outcome.configs[arm])
        changed = [key for key in (*before, *(k for k in after if k not in before)) if before.get(key) != after.get(key)]
        rows += [(arm, key, _value(before, key), _value(after, key)) for key in changed]
        rows += [] if changed else [(arm, "-", "", "as the base")]
    return Table("Differences", ("arm", "key", "base", "arm's value"), tuple(rows))


ANALYSED = ("experts", "similarity", "changes")  # what `--analyse` draws
_PICTURES = {
    "curves": "Learning curves (mean and range over seeds)",
    "load": "Expert load at the end of training",
    "ranking": "Arms from best to worst (each seed, and their mean)",
    "experts": "Which experts each domain prefers (in brackets, the share of the domain that a token's expert tells)",
    "similarity": "How alike experts answer (last layer; in brackets, the mean)",
    "changes": "How routing changes from checkpoint to checkpoint",
}


def _analysed(outcome: Outcome, folder: Path) -> list[Path]:
    """The pictures of an analysis that is newer than every run of the outcome; those of an older one would show other routers."""
    runs = [run.path / "run.json" for seeds in outcome.runs.values() for run in seeds.values()]
    trained = max((path.stat().st_mtime for path in runs if path.exists()), default=0.0)
    found = (folder / f"{name}.png" for name in ANALYSED)
    return [path for path in found if path.exists() and path.stat().st_mtime > trained]


def _headline(outcome: Outcome) -> str:
    for verdict in outcome.verdicts:
        if verdict.claim.headline:
            reason = f" ({_e(verdict.reason)})" if verdict.reason else ""
            colour = tables.COLOURS[verdict.word]
            return (
                f'<div class="headline {colour}"><strong>{_e(verdict.word)}</strong>{reason}<br>'
                f'<span style="color: var(--ink)">{_e(verdict.claim.sentence)}</span></div>'
            )
    return '<div class="headline dim">The headline claim was not judged: not all of its arms have run.</div>'


def _unjudged(outcome: Outcome) -> str:
    lines = [
        f"{claim.sentence} (needs {', '.join(a for a in claim.arms if a not in outcome.runs)})" for claim in outcome.unjudged
    ]
    return f'<p class="facts">Not judged here: {_e("; ".join(lines))}.</p>' if lines else ""


def _diverged(outcome: Outcome) -> str:
    lines = [
        f"{arm}, seed {s}: {run.diverged}" for arm, seeds in outcome.runs.items() for s, run in seeds.items() if run.diverged
    ]
    return "".join(f'<p class="red">Diverged: {_e(line)}</p>' for line in lines)


def _notes(outcome: Outcome) -> str:
    notes = [f"<strong>{_e(a)}</strong>: {_e(outcome.study.arm(a).note)}" for a in outcome.runs if outcome.study.arm(a).note]
    text = "".join(f"<p>{note}</p>" for note in notes)
    return text + (f"<p>{_e(outcome.study.notes)}</p>" if outcome.study.notes else "")


def _ledger_line(outcome: Outcome) -> str:
    if outcome.missing:
        return f"Not in the ledger: {outcome.missing}."
    return f"The ledger entry, {record.entry_name(outcome.study.slug, outcome.preset, outcome.ablation)}:"


def _other_reports(folder: Path, linked: set[str]) -> str:
    found = sorted(p.relative_to(folder).as_posix() for p in folder.glob("*/*/report.html"))
    items = "".join(f'<li><a href="{_e(p)}">{_e(p.removesuffix("/report.html"))}</a></li>' for p in found if p not in linked)
    return f"<h2>Reports without a ledger entry</h2><ul>{items}</ul>" if items else ""


def _table(table: Table, links: Sequence[str] = (), verdict_column: int = -1) -> str:
    head = "".join(f"<th>{_breakable(column, most=8)}</th>" for column in table.columns)
    body = []
    for i, row in enumerate(table.rows):
        cells = [_breakable(cell) for cell in row]
        if links and links[i]:
            cells[0] = f'<a href="{_e(links[i])}">{cells[0]}</a>'
        if table.styles:
            cells[verdict_column] = f'<span class="{table.styles[i]}">{cells[verdict_column]}</span>'
        body.append(
            "<tr>" + "".join(f'<td class="{_kind(text)}">{cell}</td>' for cell, text in zip(cells, row, strict=True)) + "</tr>"
        )
    notes = "".join(f'<p class="note">{_e(note)}</p>' for note in table.notes)
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(body)}</table></div>{notes}'


def _kind(text: str) -> str:
    """Numbers and names stay on one line; sentences get room for a few words in each."""
    return "short" if len(text) <= SHORT else "long" if len(text) > 3 * SHORT else ""


def _breakable(text: str, most: int = SHORT) -> str:
    """A long name may be broken after the marks that divide it; of a sentence only the spaces are."""
    return re.sub(r"([/_.,])(?=[^\W\d])", r"\1<wbr>", _e(text)) if len(text) > most and " " not in text else _e(text)


def _section(title: str, body: str) -> str:
    return f"<h2>{_e(title)}</h2>\n{body}"


def _image(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{_e(_PICTURES[path.stem])}" src="data:image/png;base64,{data}">'


def _json(data: Any) -> str:
    return f"<details><summary>JSON</summary><pre>{_e(json.dumps(data, indent=1))}</pre></details>"


def _document(title: str, body: str) -> str:
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{_e(title)}</title>'
    return f'<!doctype html><html lang="en"><head>{head}<style>{STYLE}</style></head><body>\n{body}\n</body></html>\n'


def _value(flat: Mapping[str, Any], key: str) -> str:
    return repr(flat[key]) if key in flat else "-"


def _e(text: str) -> str:
    return html.escape(str(text))


def _link_events(outcome: Outcome, folder: Path) -> Path:
    """A folder of links `<arm>-seed<n>` to the runs, whose own names are hashes."""
    folder.mkdir(parents=True, exist_ok=True)
    for arm, seeds in outcome.runs.items():
        for seed, run in seeds.items():
            link = folder / f"{arm}-seed{seed}"
            # Made beside it and moved: another command may be writing the same report.
            new = link.with_name(f".{link.name}.{os.getpid()}")
            os.symlink(run.path.resolve(), new, target_is_directory=True)
            os.replace(new, link)
    return folder
