"""What the README and docs/ say of results and methods, made from the ledger and the catalogue.

A page has `<!-- ledger:NAME -->` ... `<!-- end -->` around what is made; NAME is a key of `TABLES`. The runner renews all pages with
every entry of `--record`; `python -m experiments.docs` does it by hand.
"""

import math
import re
from pathlib import Path
from typing import Any

from experiments import catalog, pods, record, tables
from experiments.environment import REPOSITORY
from experiments.study import load
from moejax.core.files import write_atomically

PAGES = (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")))
LEDGER = record.LEDGER  # the one that the pages are about
DEMO = "first_mixture"


def render(text: str, ledger: Path = LEDGER) -> str:
    """`text` with its count, and what stands between `<!-- ledger:NAME -->` and `<!-- end -->`, made anew."""

    def table(match: re.Match[str]) -> str:
        return f"<!-- ledger:{match[1]} -->\n{TABLES[match[1]](ledger)}\n<!-- end -->"

    text = re.sub(r"<!-- ledger:(\w+) -->.*?<!-- end -->", table, text, flags=re.DOTALL)
    return re.sub(r"(<!-- count -->)[^.\n]*", lambda match: match[1] + catalog.count(catalog.load(), ledger), text)


def demo_table(ledger: Path) -> str:
    """Arms and claims of the demo's study."""
    entry = record.read_entry(ledger / f"{DEMO}.json")
    notes = {arm.name: arm.note for arm in load(DEMO).arms}
    lines = ["| arm | bits per byte | active parameters | what it is |", "|---|---|---|---|"]
    for arm, found in entry["arms"].items():
        # An arm that diverged has neither.
        bits = tables.spread(tuple(found.get("eval/bits_per_byte", {}).get("values", ())))
        active = tables.quantity(found.get("active_params", {}).get("mean", math.nan))
        lines.append(f"| {arm} | {bits} | {active} | {notes[arm]} |")
    lines += ["", "| claim | measured | interval | verdict |", "|---|---|---|---|"]
    return "\n".join([*lines, *(_row(claim) for claim in entry["claims"])])


def verdict_table(ledger: Path) -> str:
    """Of every other study that has been judged at CPU scale: its headline claim, and the verdicts on all its claims."""
    lines = ["| study | claim | measured | interval | verdict | all claims, with ablations |", "|---|---|---|---|---|---|"]
    shown = [entry for entry in record.entries(ledger) if entry["preset"] == "cpu"]
    # In the repository's pages the demo has a table of its own.
    found = [entry for entry in shown if ledger != LEDGER or entry["slug"] != DEMO]
    for entry in found:
        if entry["ablation"]:
            continue
        # An ablation's entry judges the study's other claims again, on the same runs.
        claims = {claim["claim"]: claim for each in found if each["slug"] == entry["slug"] for claim in each["claims"]}
        counts = tables.count_verdicts([{"claims": list(claims.values())}])
        outdated = f", outdated: {entry['outdated']}" if "outdated" in entry else ""
        if not all("looks" in claim for claim in entry["claims"]):
            outdated += f", judged by an earlier rule: the 95 % interval of {entry['seeds']} seeds"
        lines += [f"| {entry['slug']} {_row(claim)} {counts}{outdated} |" for claim in entry["claims"] if claim["headline"]]
    return "\n".join(lines)


def pod_table(ledger: Path) -> str:
    """What compiling the configs of published sizes for pods says."""
    return pods.markdown(ledger / pods.RECORD.name)


def _row(claim: dict[str, Any]) -> str:
    interval = "-" if any(map(math.isnan, claim["interval"])) else " to ".join(map(tables.number, claim["interval"]))
    return f"| {claim['claim']} | {tables.number(claim['mean'])} | {interval} | {claim['verdict']} |"


def catalogue_table(ledger: Path) -> str:
    """Every method: its title, and where its study and its tests are."""
    found = record.entries(ledger)
    lines = [
        "| method | title | family | year | implemented by | tests | study | verdicts |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in catalog.load().values():
        names = ", ".join(f"`{name}`" for name in row.implements)
        tests = ", ".join(f"[tests](../{path})" for path in row.tests)
        study = f"[study](../{row.study})" if row.study else ""
        verdicts = tables.count_verdicts([entry for entry in found if entry["slug"] == row.slug])
        lines.append(
            f"| {row.slug} | [{row.title}](https://arxiv.org/abs/{row.arxiv}) | {row.family} | {row.year} | {names} | {tests} "
            f"| {study} | {verdicts} |"
        )
    return "\n".join(lines)


TABLES = {"demo": demo_table, "verdicts": verdict_table, "pods": pod_table, "catalogue": catalogue_table}


def renew(ledger: Path) -> None:
    """Rewrites the pages if `ledger` is the repository's own and says something new; for another one, the table of verdicts beside it."""
    if ledger != LEDGER:
        write_atomically(ledger / "verdicts.md", "# Verdicts of your own runs\n\n" + verdict_table(ledger) + "\n")
        return
    for page in PAGES:
        text = page.read_text()
        if (new := render(text, ledger)) != text:
            write_atomically(page, new)


if __name__ == "__main__":
    renew(LEDGER)
