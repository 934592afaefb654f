"""What the README says is so: its code runs, its files and tests exist, its numbers are the ledger's."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from experiments import flags, readme
from experiments.study import load

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text()
PAGES = {page: (REPOSITORY / page).read_text() for page in ("README.md", "CONTRIBUTING.md")}


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    """The cells of a Markdown table, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language; '' for those that name none."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [code for name, code in found if name == language]


@pytest.mark.slow
def test_the_python_code_runs() -> None:
    """In one namespace, from the first block to the last."""
    found = blocks(README, "python")
    assert len(found) >= 3
    names: dict[str, object] = {}
    for block in found:
        exec(compile(block, "README.md", "exec"), names)
    assert names["loss"] > 0
    assert names["stats"]["MoE_0"]["load"].shape == (8,)
    assert set(names["losses"]) == {"balance_loss"}
    assert names["model"].blocks[1].module.ffn.select.k == 2


@pytest.mark.parametrize("page", PAGES)
def test_linked_files_exist(page: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", PAGES[page])
    assert links
    for link in links:
        assert (REPOSITORY / link).exists(), link


def test_the_table_of_places_is_complete() -> None:
    for looked_for, place in rows(section("Where to find things")):
        assert looked_for
        assert re.fullmatch(r"\[(.+)\]\(\1\)", place), place


def test_every_point_designed_out_names_a_test_that_exists() -> None:
    points = rows(section("Designed out"))
    assert len(points) >= 15
    for _, place in points:
        file, _, name = place.strip("`").partition("::")
        tree = ast.parse((REPOSITORY / file).read_text())
        assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, place


@pytest.mark.parametrize("page", PAGES)
def test_command_lines_are_valid(page: str) -> None:
    commands = [
        shlex.split(line, comments=True)
        for block in blocks(PAGES[page], "")
        for line in block.splitlines()
        if line.startswith("python -m experiments.run")
    ]
    assert commands
    for command in commands:
        options = flags.parse(command[3:])
        if options.study:
            study = load(options.study)
            study.group(options.ablation)
            study.preset(options.preset or "smoke")
        if options.config:
            assert (REPOSITORY / options.config).is_file()


def test_backends_are_those_that_there_are() -> None:
    from moejax.dispatch import BACKENDS

    assert {row[0].strip("`") for row in rows(section("Backends"))} == set(BACKENDS)


def test_the_results_are_the_ledgers() -> None:
    assert readme.render(README) == README, "python -m experiments.readme writes the tables anew"
