"""The examples run as they are, in a process of their own, and say what they are there to show."""

import os
import re
import subprocess
import sys

import nbformat
import pytest
from nbclient import NotebookClient
from places import ROOT

EXAMPLES = ROOT / "examples"
NOTEBOOK = EXAMPLES / "quickstart.ipynb"


@pytest.fixture
def found_from_the_checkout(monkeypatch):
    """Processes that are started import the package that is tested."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))


def test_custom_control(found_from_the_checkout):
    command = [sys.executable, str(EXAMPLES / "custom_control.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^(None|ComeToAnEnd\(.*\)): \[([\d, ]+)\] tokens$", done.stdout, re.MULTILINE)
    (_, base), (_, own) = [(name, [int(length) for length in lengths.split(", ")]) for name, lengths in found]
    for before, after in zip(base, own, strict=True):
        assert after == before if before <= 64 else 64 < after <= before
    assert sum(own) < sum(base)


def test_notebook(found_from_the_checkout):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    [control] = [cell for cell in notebook.cells if "targets" in cell.source]
    written = {int(n): int(length) for n, length in re.findall(r"(\d+): (\d+)", str(control.outputs[-1].data))}
    assert all(abs(length - n) <= 0.25 * n + 4 for n, length in written.items())
    [trade] = [cell for cell in notebook.cells if "Tilt(beta)" in cell.source]
    by_beta = [float(tokens) for tokens in re.findall(r"-?\d+: ([\d.]+)", str(trade.outputs[-1].data))]
    assert by_beta == sorted(by_beta, reverse=True)


def test_notebook_is_stripped():
    """Outputs would change with every run, and hide what changed."""
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)


def test_python_of_the_readme(found_from_the_checkout):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lengths = [int(tokens) for tokens in re.findall(r"^(\d+) tokens: ", done.stdout, re.MULTILINE)]
    assert len(lengths) == 2
    assert all(abs(length - 96) <= 12 for length in lengths)
