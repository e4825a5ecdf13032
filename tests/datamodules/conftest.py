import json

import pytest

from datamodules import TextRollouts
from datamodules.table import build_table
from datamodules.tokenise import Limits


@pytest.fixture
def build(tmp_path):
    """Write lines to a file and tokenise it, with the cache beside."""

    def build(processor, *lines, **limits):
        file = tmp_path / "rollouts.jsonl"
        content = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        file.write_bytes(b"\n".join(content))
        return build_table(processor, Limits(**limits), files=[str(file)], cache_dir=tmp_path / "cache")[0]

    return build


@pytest.fixture
def set_up(tmp_path):
    def set_up(*lines, **settings):
        file = tmp_path / "rollouts.jsonl"
        file.write_text("".join(lines))
        data = TextRollouts(str(file), processor="tiny-text", cache_dir=str(tmp_path / "cache"), **settings)
        data.setup("fit")
        return data

    return set_up


@pytest.fixture
def said(monkeypatch):
    texts = []
    monkeypatch.setattr("datamodules.rollouts.rank_zero_info", texts.append)
    monkeypatch.setattr("datamodules.split.rank_zero_info", texts.append)
    return texts
