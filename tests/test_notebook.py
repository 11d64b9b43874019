"""notebooks/quickstart.ipynb: committed without outputs, it runs, and the small model gets better."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient


NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_committed_without_outputs(notebook):
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.cell_type == "markdown" or (cell.outputs == [] and cell.execution_count is None), cell.id


def test_it_runs_and_the_small_model_gets_better(notebook, tmp_path, monkeypatch):
    """40 CPU seconds. The figures of the last cell are what came out; here only that the order is right."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where it works
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    table = "".join(output.get("text", "") for output in notebook.cells[-2].outputs)
    rows = re.findall(r"^(\S.*?) {2,}([\d.]+)% .*?(\d+) +(\d+)$", table, re.MULTILINE)
    accuracy = {name: float(percent) for name, percent, _, _ in rows}
    changed = {name: (int(helped), int(hurt)) for name, _, helped, hurt in rows}
    local = [name for name in accuracy if name.startswith("S2T-Local")]
    assert len(rows) == 5 and len(local) == 2, table
    for name in local:
        assert accuracy["student"] + 20 < accuracy[name] <= accuracy["teacher"], table
        helped, hurt = changed[name]
        assert accuracy[name] - accuracy["student"] == pytest.approx((helped - hurt) / 2, abs=0.06)  # of 200
    assert changed["student"] == (0, 0)
