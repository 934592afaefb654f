"""The matrix shows what the battery finds; what the battery finds is the business of tests/battery."""

import pytest

from experiments import matrix
from experiments.battery.subjects import Subject
from experiments.study import load
from moejax.core.errors import ConfigError


def test_refusals_are_cells_and_mistakes_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(subject: Subject) -> str:
        raise ConfigError(f"{subject.name} cannot\n  do this")

    monkeypatch.setattr(matrix, "PROPERTIES", {"name": lambda subject: subject.name, "able": refuses})
    found = matrix.matrix([load("switch")])
    assert found == {"switch": {"name": matrix.Cell("switch"), "able": matrix.Cell("no", "switch cannot do this")}}
    assert matrix.reasons(found["switch"]) == ["able: switch cannot do this"]
    shown = matrix.table(found)
    assert shown.columns == ("method", "name", "able")
    assert shown.rows == (("switch", "switch", "no"),)

    def is_wrong(subject: Subject) -> str:
        raise AssertionError("a bug")

    monkeypatch.setattr(matrix, "PROPERTIES", {"able": is_wrong})
    with pytest.raises(AssertionError, match="a bug"):
        matrix.examine(load("switch"))
