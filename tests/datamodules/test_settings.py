import pytest
from rollout_lines import line

from datamodules import TextRollouts, VisionRollouts
from lenvm_lightning.errors import DataError


def test_layouts_that_cannot_be(set_up, vision_rollouts, tmp_path):
    with pytest.raises(
        DataError,
        match=r"packed fills gaps .* got completions_per_batch: 4; set layout: shared, or completions_per_batch: 1",
    ):
        set_up(line("p"), layout="packed", completions_per_batch=4)
    with pytest.raises(DataError, match="layout must be one of rows, packed, shared; got tree"):
        set_up(line("p"), layout="tree")
    with pytest.raises(DataError, match="layout: packed is for text; with images set layout: shared, or rows"):
        VisionRollouts(str(vision_rollouts), layout="packed")
    with pytest.raises(DataError, match=r"layout: packed is for text, but .* has images"):
        TextRollouts(str(vision_rollouts), processor="tiny-vl", cache_dir=str(tmp_path), layout="packed").setup()


def test_settings_that_cannot_be(set_up):
    with pytest.raises(DataError) as caught:
        set_up(line("p"), completions_per_batch=0, train_prompts=0, train_completions=-1)
    for text in ("completions_per_batch must be at least 1, got 0", "train_prompts must be at least 1, got 0",
                 "train_completions must be at least 1, got -1"):  # fmt: skip
        assert text in str(caught.value)


def test_an_empty_text_ends_no_segment():
    with pytest.raises(DataError, match="until is an empty text"):
        TextRollouts(until="")
