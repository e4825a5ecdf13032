import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2Config

from lenvm_lightning.models import dtypes
from lenvm_lightning.models.dtypes import open_value_model, own_dtype, usual_dtype
from lenvm_lightning.models.value_model import LengthValueModel

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(("has", "own", "expected"), [
    (True, torch.bfloat16, "bfloat16"),
    (False, torch.bfloat16, "float32"),
    (True, torch.float16, "float32"),
    (True, torch.float32, "float32"),
    (True, None, "float32"),
])  # fmt: skip
def test_a_cpu_takes_bfloat16_where_it_has_instructions_for_it(monkeypatch, has, own, expected):
    monkeypatch.setattr(dtypes, "has_bfloat16", lambda device: has)
    assert usual_dtype(Qwen2Config(dtype=own), CPU) == expected


def test_a_gpu_takes_what_the_checkpoint_has():
    assert usual_dtype(Qwen2Config(dtype=torch.float16), CUDA) == "auto"


def test_the_language_model_of_a_vision_language_model_says_it_too():
    config = Qwen2_5_VLConfig(text_config={"dtype": "bfloat16"})
    config.dtype = None
    assert own_dtype(config) == torch.bfloat16


def test_a_value_model_in_float16_is_computed_in_float32_on_a_cpu(tmp_path):
    LengthValueModel.from_pretrained("tiny-text-lenvm", dtype="float16").save_pretrained(tmp_path)
    opened = open_value_model(tmp_path, gamma=None, dtype=None, device=CPU)
    assert opened.backbone.dtype == torch.float32
    asked = open_value_model(tmp_path, gamma=None, dtype="float16", device=CPU)
    assert asked.backbone.dtype == torch.float16
