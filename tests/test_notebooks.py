"""The notebooks run from top to bottom, and what is stored in them is small and without errors."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def outputs(notebook) -> list:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def test_there_are_three():
    assert len(NOTEBOOKS) == 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    stored = outputs(notebook)
    assert path.stat().st_size < 200_000
    assert sum(output.output_type == "display_data" for output in stored) >= 2
    assert not [output for output in stored if output.output_type == "error"]
    # raises at the first cell with an error
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert [output.output_type for output in outputs(notebook) if output.get("name") != "stderr"] == [
        output.output_type for output in stored
    ]
