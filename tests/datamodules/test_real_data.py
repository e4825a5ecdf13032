"""Real answers of real models, where the data lies beside the checkout; never copied into the project."""

import itertools
import subprocess
import sys

import pytest
from places import SHARED

from datamodules import TextRollouts, VisionRollouts

CONVERTER = SHARED / "data" / "to_rollouts.py"
pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not CONVERTER.exists(), reason="the real data is not beside this checkout"),
]


@pytest.mark.parametrize(
    ("kind", "module", "processor"), [("gsm8k", TextRollouts, "tiny-text"), ("mathvision", VisionRollouts, "tiny-vl")]
)
def test_real_rollouts_become_batches(kind, module, processor, tmp_path):
    whole, some = tmp_path / "all.jsonl", tmp_path / "some.jsonl"
    subprocess.run([sys.executable, CONVERTER, kind, whole], check=True, capture_output=True)
    with whole.open(encoding="utf-8") as lines:
        some.write_text("".join(itertools.islice(lines, 240)), encoding="utf-8")
    settings = {"processor": processor, "max_length": 1536, "batch_tokens": 4096, "max_bad_share": 0.0}
    data = module(str(some), allow_images_from=str(SHARED / "data"), **settings)
    data.prepare_data()
    data.setup()
    assert len(data.train_rows) + len(data.val_rows) == 240
    assert data.val_prompts > 3  # every tenth prompt of the files says `test`
    assert data.facts.truncated_share == 0.0
    batch = next(iter(data.train_dataloader()))
    assert int(batch["attention_mask"].sum()) <= 4096
    assert bool((batch["remaining"][batch["mask"]] >= 0).all())
    assert ("pixel_values" in batch["vision"]) == (kind == "mathvision")
