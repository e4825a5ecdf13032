"""The examples run as they are, in a process of their own, and say what they are there to show."""

import json
import re

import nbformat
from forks import Fork, code, finish, script
from IPython.core.interactiveshell import InteractiveShell
from places import ROOT

EXAMPLES = ROOT / "examples"
NOTEBOOK = EXAMPLES / "quickstart.ipynb"


def test_custom_control():
    said = finish(script(EXAMPLES / "custom_control.py"))
    found = re.findall(r"^(None|ComeToAnEnd\(.*\)): \[([\d, ]+)\] tokens$", said, re.MULTILINE)
    (_, base), (_, own) = [(name, [int(length) for length in lengths.split(", ")]) for name, lengths in found]
    for before, after in zip(base, own, strict=True):
        assert after == before if before <= 64 else 64 < after <= before
    assert sum(own) < sum(base)


def code_cells() -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]


def run_cells() -> None:
    """Run every cell of the notebook as a kernel does, and print what those that end with a value show."""
    shell = InteractiveShell.instance(colors="nocolor")
    shown = {}
    for cell in code_cells():
        done = shell.run_cell(cell.source)
        done.raise_error()
        shown[cell.source] = repr(done.result)
    print(json.dumps(shown))


def test_notebook():
    shown = json.loads(finish(Fork(run_cells)).splitlines()[-1])
    [control] = [result for source, result in shown.items() if "targets" in source]
    written = {int(n): int(length) for n, length in re.findall(r"(\d+): (\d+)", control)}
    assert list(written) == [24, 48, 96, 192]
    assert all(abs(length - n) <= 0.25 * n + 4 for n, length in written.items())
    [trade] = [result for source, result in shown.items() if "Tilt(beta)" in source]
    by_beta = [float(tokens) for tokens in re.findall(r"-?\d+: ([\d.]+)", trade)]
    assert len(by_beta) == 3
    assert by_beta == sorted(by_beta, reverse=True)


def test_notebook_is_stripped():
    """Outputs would change with every run, and hide what changed."""
    assert all(not cell.outputs and cell.execution_count is None for cell in code_cells())


def test_python_of_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    [source] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    lengths = [int(tokens) for tokens in re.findall(r"^(\d+) tokens: ", finish(code(source)), re.MULTILINE)]
    assert len(lengths) == 2
    assert all(abs(length - 96) <= 12 for length in lengths)
