"""Where there is no vLLM, what needs it says so."""

import importlib.util
import subprocess
import sys

import pytest

from lenvm_lightning.errors import GeneratorError
from lenvm_lightning.rollouts.sample import open_generator

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="here is a vLLM")


def test_a_generator_says_what_is_missing():
    with pytest.raises(GeneratorError, match=r"needs vLLM in this environment.*pip install vllm"):
        open_generator("vllm:tiny-text")


def test_the_module_says_what_is_missing():
    code = "import lenvm_lightning.serving.vllm"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "No module named 'vllm'" in done.stderr
