import copy

import pytest
import torch
from torch import nn
from value_models import build, text_inputs

from lenvm_lightning.models.lenvm_config import LenVMConfig
from lenvm_lightning.models.value_head import ValueHead
from lenvm_lightning.models.value_model import LengthValueModel


@pytest.mark.parametrize("cast", ["bfloat16", "half"])
def test_head_keeps_its_digits(cast):
    model = build("tiny-text")
    before = copy.deepcopy(model.v_head.state_dict())
    getattr(model, cast)()
    assert model.backbone.dtype in (torch.bfloat16, torch.float16)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.v_head.state_dict().items())
    assert {tensor.dtype for tensor in model.v_head.state_dict().values()} == {torch.float32}
    if cast == "bfloat16":
        assert model(**text_inputs("right")).dtype == torch.float32


def test_head_ignores_autocast():
    head, hidden = ValueHead(32), torch.randn(3, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(hidden), head(hidden.clone()))
        inside = head(hidden)
        rounded = nn.functional.linear(hidden, head.fc.weight)
    assert rounded.dtype == torch.bfloat16
    assert inside.dtype == torch.float32
    assert torch.equal(inside, head(hidden))
    with torch.autocast("cpu", torch.bfloat16):
        assert build("tiny-text")(**text_inputs("right")).dtype == torch.float32


def test_float64_stays_float64():
    model = build("tiny-text").double()
    assert model.v_head.fc.weight.dtype == torch.float64
    assert model(**text_inputs("right")).dtype == torch.float64
    model = LengthValueModel.from_backbone("tiny-text", LenVMConfig(gamma=0.9), pretrained=False, dtype="float64")
    assert model.v_head.fc.weight.dtype == torch.float64
    assert model(**text_inputs("right")).dtype == torch.float64


def test_fresh_head_predicts_the_expected_length():
    model = LengthValueModel.from_backbone(
        "tiny-text", LenVMConfig(gamma=0.997), pretrained=False, expected_length=300.0
    ).eval()
    remaining = model.remaining(model(**text_inputs("right")))
    assert ((remaining > 200) & (remaining < 450)).all()
