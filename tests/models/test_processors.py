import io
import shutil
import sys

import pytest
import transformers
from coded import with_code
from published import publish
from transformers import AutoTokenizer
from value_models import trained

from lenvm_lightning import tinyworld
from lenvm_lightning.errors import CheckpointError
from lenvm_lightning.models.processors import load_processor


def test_a_tokenizer_that_is_not_there(tmp_path):
    publish(tmp_path, "value_head.safetensors")
    with pytest.raises(CheckpointError, match="no tokenizer or processor could be read"):
        load_processor(tmp_path)


def test_the_tokenizer_comes_back(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tinyworld.path("tiny-text"))
    trained("tiny-text").save_pretrained(tmp_path, tokenizer)
    again = load_processor(tmp_path)
    assert again("So 3 * 4 = 12<|im_end|>").input_ids == tokenizer("So 3 * 4 = 12<|im_end|>").input_ids


def test_code_of_a_tokenizer_runs_only_where_that_is_said(tmp_path, monkeypatch):
    """transformers would ask at the terminal."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    folder, mark = with_code(tmp_path / "coded", tmp_path / "ran"), tmp_path / "ran"
    with pytest.raises(CheckpointError, match=r"of its own: .*fit\.model\.backbone\.trust_remote_code: true"):
        load_processor(folder)
    load_processor(with_code(tmp_path / "known", mark, config=False))  # transformers has code of its own for that type
    assert sys.stdin.tell() == 0
    assert not mark.exists()
    assert len(load_processor(folder, trust_remote_code=True)) > 0
    assert mark.exists()


@pytest.mark.parametrize(("name", "content"), [
    ("tokenizer.json", b"{}"), ("tokenizer.json", b"[1]"), ("tokenizer.json", b"\xff"),
    ("tokenizer_config.json", b"[1]"), ("tokenizer_config.json", b"{"), ("config.json", b"[1]"),
    ("tokenizer_config.json", b'{"tokenizer_class": [1]}'),
])  # fmt: skip
def test_damaged_tokenizers(tmp_path, name, content):
    folder = shutil.copytree(tinyworld.path("tiny-text"), tmp_path / "t")
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"no tokenizer or processor could be read from '{folder}'"):
        load_processor(folder)
