"""What the README and the pages in docs/ say is so: its code runs, its files and tests exist, its numbers are the ledger's."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from experiments import docs, flags
from experiments.study import load

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = {page.relative_to(REPOSITORY).as_posix(): page.read_text() for page in docs.PAGES}
WITH_CODE = [page for page, text in PAGES.items() if "```python" in text]
WITH_COMMANDS = [page for page, text in PAGES.items() if "\npython -m experiments.run" in text]


def section(page: str, title: str) -> str:
    return PAGES[page].split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    """The cells of a Markdown table, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language; '' for those that name none."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [code for name, code in found if name == language]


def test_the_readme_is_short() -> None:
    assert len(PAGES["README.md"].encode()) <= 8192


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_CODE)
def test_the_python_code_runs(page: str) -> None:
    """In one namespace, from the first block to the last."""
    names: dict[str, object] = {}
    for block in blocks(PAGES[page], "python"):
        exec(compile(block, page, "exec"), names)


@pytest.mark.parametrize("page", PAGES)
def test_linked_files_exist(page: str) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", PAGES[page]):
        assert ((REPOSITORY / page).parent / link).exists(), link


def test_the_table_of_places_is_complete() -> None:
    for looked_for, place in rows(section("docs/path_of_a_token.md", "Where to find things")):
        assert looked_for
        assert re.fullmatch(r"\[(.+)\]\(\.\./\1\)", place), place


def test_every_point_designed_out_names_a_test_that_exists() -> None:
    points = rows(PAGES["docs/designed_out.md"])
    assert len(points) >= 15
    for _, place in points:
        file, _, name = place.strip("`").partition("::")
        tree = ast.parse((REPOSITORY / file).read_text())
        assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, place


@pytest.mark.parametrize("page", WITH_COMMANDS)
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

    assert {row[0].strip("`") for row in rows(section("docs/path_of_a_token.md", "Backends"))} == set(BACKENDS)


@pytest.mark.parametrize("page", PAGES)
def test_what_is_generated_is_what_the_ledger_and_the_catalogue_say(page: str) -> None:
    assert docs.render(PAGES[page]) == PAGES[page], "python -m experiments.docs writes the pages anew"
