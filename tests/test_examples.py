"""The examples do what they say, on the embedded models."""

import subprocess
import sys

import nbformat
import pytest
from nbclient import NotebookClient
from places import ROOT

EXAMPLES = ROOT / "examples"
SMALLER = {"custom_task.py": ["--limit", "2", "--n", "1", "--out", "results"]}
TOLD = {"custom_control.py": "16 of 16 within n, 16 with an end of their own", "custom_task.py": "places"}
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


@pytest.mark.parametrize("script", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_script_runs(script, tmp_path):
    command = [sys.executable, str(EXAMPLES / script), *SMALLER.get(script, [])]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert TOLD.get(script, "") in done.stdout


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_runs_and_carries_no_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
