import pytest
from published import publish
from value_models import GAMMA

from lenvm_lightning.errors import CheckpointError
from lenvm_lightning.models.value_model import LengthValueModel


def test_a_shard_is_missing(tmp_path):
    publish(tmp_path, "sharded index")
    (tmp_path / "model-head.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lists model-head\.safetensors.*Download it again"):
        LengthValueModel.from_pretrained(tmp_path, gamma=GAMMA)
    publish(tmp_path, "sharded index")
    next(tmp_path.glob("model-00001-of-*")).unlink()
    with pytest.raises(CheckpointError, match="no weights could be read"):
        LengthValueModel.from_pretrained(tmp_path, gamma=GAMMA)
