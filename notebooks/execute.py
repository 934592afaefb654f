"""Executes the notebooks and stores what they print and draw: `python notebooks/execute.py [01_quickstart.ipynb ...]`.

What a reader need not see is left out: progress that was overwritten, warnings, execution times, and the paths of this machine.
`MOEJAX_NOTEBOOK_STEPS` makes the trainings shorter, to try.
"""

import os
import sys
import tempfile
from pathlib import Path

import nbclient
import nbformat

HERE = Path(__file__).resolve().parent


def execute(path: Path) -> nbformat.NotebookNode:
    """The notebook with fresh outputs; an error in a cell raises."""
    notebook = nbformat.read(path, as_version=4)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        client = nbclient.NotebookClient(
            notebook, timeout=1800, startup_timeout=300, kernel_name="python3", resources=resources, record_timing=False
        )
        client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = cleaned(cell.outputs)
    kept = ("kernelspec", "colab")
    notebook.metadata = {name: notebook.metadata[name] for name in kept} | {"language_info": {"name": "python"}}
    return notebook


def cleaned(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """A cell's outputs without warnings, lines that were overwritten and this machine's paths; what was printed in a run is one."""
    kept: list[nbformat.NotebookNode] = []
    for output in outputs:
        if output.output_type != "stream":
            kept.append(output)
        elif output.name == "stdout":
            if kept and kept[-1].output_type == "stream":
                kept[-1].text += output.text
            else:
                kept.append(output)
    for output in kept:
        if output.output_type == "stream":
            output.text = "\n".join(line.rstrip("\r ").rpartition("\r")[2] for line in output.text.split("\n"))
            for path in (str(HERE.parent), tempfile.gettempdir(), str(Path.home())):
                output.text = output.text.replace(path, "...")
    return kept


if __name__ == "__main__":
    for file in [HERE / name for name in sys.argv[1:]] or sorted(HERE.glob("*.ipynb")):
        nbformat.write(execute(file), file)
        print(f"wrote {file.name}, {file.stat().st_size / 1e3:.0f} kB")
