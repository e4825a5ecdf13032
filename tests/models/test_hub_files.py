import json

import pytest
from published import INDEX, publish
from value_models import GAMMA

from lenvm_lightning.errors import CheckpointError
from lenvm_lightning.models.hub_files import shard_names, tensors_of_file
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


@pytest.mark.parametrize(
    "content",
    [
        {}, {"weight_map": [1]}, {"weight_map": {"v_head.fc.weight": 3}}, {"weight_map": {"a": "../../x.safetensors"}},
        {"weight_map": {"a": "/etc/passwd"}}, {"weight_map": {"a": ""}}, {"weight_map": {"a": "x\\y"}},
    ],
)  # fmt: skip
def test_an_index_of_shards_that_is_none(tmp_path, content):
    publish(tmp_path, "value_head.safetensors")
    (tmp_path / "value_head.safetensors").unlink()
    (tmp_path / INDEX).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=rf"{INDEX} must say under weight_map in which file of its folder"):
        LengthValueModel.from_pretrained(tmp_path, gamma=GAMMA)
    (tmp_path / INDEX).write_text("[1]")
    with pytest.raises(CheckpointError, match=rf"{INDEX} must hold a JSON object"):
        shard_names(tmp_path / INDEX)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 200,
        b"\xff" * 200,
        b"\xff\xff\xff\xff\xff\xff\xff\x7f{}",
        b"\x02\0\0\0\0\0\0\0[]",
        b"\x10" + b"\0" * 7 + b"{" * 16,
    ],
)
def test_damaged_safetensors(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.safetensors is damaged: .*Save or download it again"):
        list(tensors_of_file(tmp_path / "x.safetensors", lambda key: True))
