"""Model directories that come with code of their own, which leaves a mark where it runs."""

import json
import shutil
from pathlib import Path

from lenvm_lightning import tinyworld

_CONFIG = """
from pathlib import Path
Path({mark!r}).touch()
from transformers import Qwen2Config, Qwen2Model


class MineConfig(Qwen2Config):
    model_type = "mine"


class Mine(Qwen2Model):
    config_class = MineConfig
"""
_TOKENIZER = """
from pathlib import Path
Path({mark!r}).touch()
from transformers import Qwen2TokenizerFast


class MineTokenizer(Qwen2TokenizerFast):
    pass
"""


def with_code(folder: Path, mark: Path, config: bool = True, tokenizer: bool = True) -> Path:
    """A copy of `tiny-text` whose config, tokenizer or both are code."""
    shutil.copytree(tinyworld.path("tiny-text"), folder)
    if config:
        (folder / "mine.py").write_text(_CONFIG.format(mark=str(mark)))
        _change(folder / "config.json", model_type="mine",
                auto_map={"AutoConfig": "mine.MineConfig", "AutoModel": "mine.Mine"})  # fmt: skip
    if tokenizer:
        (folder / "words.py").write_text(_TOKENIZER.format(mark=str(mark)))
        _change(folder / "tokenizer_config.json", tokenizer_class="MineTokenizer",
                auto_map={"AutoTokenizer": [None, "words.MineTokenizer"]})  # fmt: skip
    return folder


def _change(file: Path, **entries) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**content, **entries}))
