"""The order of imports: `lint-imports` checks the contract in pyproject.toml, this file that nothing escapes it."""

import subprocess
import sys
import tomllib

from places import ROOT

HEAVY = {"torch", "transformers", "numpy", "PIL", "lightning", "datasets"}


def test_every_module_and_package_has_a_place_in_the_contract():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    (contract,) = settings["contracts"]
    assert "ignore_imports" not in contract
    named = {name.strip(" ()") for line in contract["layers"] for name in line.split(":")}
    there = {f"lenvm_lightning.{path.stem}" for path in (ROOT / "lenvm_lightning").glob("*.py")}
    there |= {f"lenvm_lightning.{path.parent.name}" for path in (ROOT / "lenvm_lightning").glob("*/__init__.py")}
    facade = {"lenvm_lightning.__init__", "lenvm_lightning.__main__"}  # they import what they like, nobody them
    assert there - facade <= named


def test_the_facade_registers_the_tiny_world_and_loads_nothing_heavy():
    code = """
import sys
import lenvm_lightning
from lenvm_lightning.models import embedded
from lenvm_lightning.rollouts.embedded import prompt_sets
print(*sorted({name.partition(".")[0] for name in sys.modules}))
print(*embedded.generators(), *prompt_sets())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules, names = done.stdout.splitlines()
    assert HEAVY & set(modules.split()) == set()
    assert names.split() == ["tiny-text", "tiny-vl", "tiny-math", "tiny-write", "tiny-vqa", "tiny-think"]
