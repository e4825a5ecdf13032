from pathlib import Path

import pytest
import torch
from value_models import GAMMA, trained

from lenvm_lightning.models.lenvm_config import LenVMConfig
from lenvm_lightning.models.value_model import LengthValueModel


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session", params=["tiny-text", "qwen2.5-vl", "untied", "smolvlm", "llava"])
def saved(request, tmp_path_factory) -> tuple[str, LengthValueModel, Path]:
    """Family, model and the directory it was saved to."""
    folder = tmp_path_factory.mktemp(request.param)
    model = trained(request.param)
    model.config = LenVMConfig(GAMMA, backbone="somewhere/base", rollouts={"p50": 70}, dropout=0.1)
    model.save_pretrained(folder)
    return request.param, model, folder
