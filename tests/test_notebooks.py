"""The notebooks run from the first cell to the last, and are committed with what they print and draw."""

import os
import re
from pathlib import Path

import nbclient
import nbformat
import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks() -> None:
    assert [path.name for path in NOTEBOOKS][:1] == ["01_quickstart.ipynb"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_committed_with_what_it_shows(path: Path) -> None:
    """`python notebooks/execute.py` wrote it: small, whole, and without a word about the machine."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata["colab"]["name"] == path.name
    assert path.stat().st_size < 300_000
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    counts = [cell.execution_count for cell in code]
    assert counts == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    shown = "".join(output.get("text", "") for output in outputs)
    assert not re.search(r"(?<![\w.])/(tmp|home|root|usr|work|Users)/", shown)
    assert "\r" not in shown
    assert "execution" not in {name for cell in code for name in cell.metadata}


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_draws(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a kernel of its own, with a training of four steps; an error in a cell raises here."""
    monkeypatch.setenv("MOEJAX_NOTEBOOK_STEPS", "4")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    # As in all tests, but on one device.
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"))
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()

    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    figures = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(figures) >= 3
    # 10 kB of base64: an empty pair of axes is smaller.
    assert all(len(figure) > 10_000 for figure in figures)
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "step 4/4" in printed
    assert "nan" not in printed
