"""The catalogue of methods: complete, well-formed, and pointing at things that exist."""

import re
from pathlib import Path

import pytest

from experiments import catalog
from moejax.core.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]
SLUGS = Path(__file__).with_name("slugs.txt").read_text().split()
ROWS = catalog.load()


def test_every_paper_has_a_row_and_every_row_is_a_paper():
    assert len(SLUGS) == 214
    assert list(ROWS) == SLUGS


def test_rows_are_well_formed():
    for row in ROWS.values():
        assert re.fullmatch(r"\d{4}\.\d{4,5}", row.arxiv), row.slug
        assert 2010 < row.year < 2030, row.slug
        assert row.title.strip() == row.title
        assert row.title


@pytest.mark.parametrize("name", sorted({name for row in ROWS.values() for name in row.implements}))
def test_every_name_resolves(name):
    assert callable(catalog.resolve(name))


def test_a_method_with_a_study_says_what_implements_it_and_has_tests_of_its_own():
    for row in ROWS.values():
        assert bool(row.study) == bool(row.implements) == bool(row.tests), row.slug
        for place in (*row.tests, *([row.study] if row.study else [])):
            assert (REPOSITORY / place).is_file(), f"{place} of {row.slug}"


def test_a_method_test_is_called_after_its_method():
    for path in (REPOSITORY / "tests/methods").glob("*/test_*.py"):
        assert path.stem.removeprefix("test_") in ROWS, path


def test_a_study_that_does_not_say_what_implements_it_is_refused(tmp_path):
    file = tmp_path / "soft_moe.py"
    file.write_text("STUDY = Study(slug='soft_moe')")
    with pytest.raises(ConfigError, match=r"soft_moe.py does not say what implements its method"):
        catalog._implements(file)


def test_the_readme_tells_the_catalogues_count():
    assert catalog.told_count((REPOSITORY / "README.md").read_text()) == catalog.count(ROWS)


def test_count_and_its_place_in_a_text(tmp_path, capsys):
    assert catalog.main(["--count"]) == 0
    printed = capsys.readouterr().out.strip()
    assert re.fullmatch(r"\d+ of 214 methods implemented, \d+ with a study, \d+ judged", printed)
    assert catalog.told_count(f"x\n<!-- count -->{printed}. And more.") == printed
    with pytest.raises(ConfigError, match="no '<!-- count -->'"):
        catalog.told_count("nothing")
    assert catalog.main(["--cuont"]) == 2


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("moejax.routing.TopKK", "moejax.routing has no 'TopKK'; did you mean 'TopK'"),
        ("moejax.nowhere.here", "moejax has no 'nowhere'"),
        ("nothing_at_all", "not a module"),
    ],
)
def test_a_name_that_means_nothing_is_refused(name, words):
    with pytest.raises(ConfigError, match=words):
        catalog.resolve(name)


GOOD = {
    "slug": '"a"',
    "title": '"A"',
    "arxiv": '"2101.00001"',
    "year": "2021",
    "tier": '"core"',
    "family": '"soft"',
}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"year": '"2021"'}, "year='2021' in row 0 .* is not of type int"),
        ({"tier": '"cor"'}, "tier 'cor' .*did you mean 'core'"),
        ({"titel": '"x"'}, "unknown field 'titel' .*did you mean 'title'"),
    ],
)
def test_a_malformed_row_is_refused(tmp_path, changes, words):
    file = tmp_path / "catalog.toml"
    file.write_text("[[method]]\n" + "\n".join(f"{k} = {v}" for k, v in {**GOOD, **changes}.items()))
    with pytest.raises(ConfigError, match=words):
        catalog.load(file)


def test_a_slug_may_not_come_twice(tmp_path):
    row = "[[method]]\n" + "\n".join(f"{k} = {v}" for k, v in GOOD.items()) + "\n"
    (tmp_path / "catalog.toml").write_text(row * 2)
    with pytest.raises(ConfigError, match=r"slug 'a' is in catalog\.toml twice"):
        catalog.load(tmp_path / "catalog.toml")
