"""The maths needs torch alone: whoever reads or tests an equation waits for nothing else."""

import subprocess
import sys

import pytest

MODULES = (
    "values",
    "returns",
    "objectives",
    "censoring",
    "guidance",
    "reweighting",
    "tree",
    "batch",
    "metrics",
    "distributions.heads",
    "rl.signals",
    "rl.sequence_rewards",
    "errors",
)
HEAVY = ("transformers", "lightning", "torchmetrics", "datasets", "peft", "PIL", "torchvision", "matplotlib")


def imported_by(code: str) -> set[str]:
    """Names of the packages that a fresh process has loaded after some lines of Python."""
    tell = "import sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{tell}"], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_no_module_of_the_maths_imports_more_than_torch():
    found = imported_by("\n".join(f"import lenvm_lightning.{name}" for name in MODULES))
    assert "torch" in found
    assert found & set(HEAVY) == set()


def test_no_test_of_the_maths_imports_more_than_torch(request):
    """Of those that this run has collected; only where it has collected nothing else."""
    folder = request.path.parent
    if any(item.path.parent != folder for item in request.session.items):
        pytest.skip("other tests have imported what they need")
    assert {name.partition(".")[0] for name in sys.modules} & set(HEAVY) == set()
