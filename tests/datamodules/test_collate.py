"""Rows as batches: cuts shift no label, and images have their tokens."""

import pytest
import torch
from rollout_lines import SEEN, USER, draw

from datamodules.collate import Collator, RolloutRows
from datamodules.table import build_table
from datamodules.tokenise import Limits


def batch_of(table, processor, limits):
    rows = RolloutRows(table, list(range(len(table))), [0] * len(table), limits)
    collator = Collator(0, getattr(processor, "image_processor", None))
    return collator([rows[i] for i in range(len(rows))])


@pytest.mark.parametrize("limits", [{"max_prompt_length": 5}, {"max_length": 60}, {"max_length": 40}])
def test_cuts_never_shift_a_label(tiny_text, text_rollouts, tmp_path, limits):
    def batch(limits):
        table, _ = build_table(tiny_text, limits, files=[str(text_rollouts)], cache_dir=tmp_path)
        assert not any(table["problem"])
        return batch_of(table, tiny_text, limits)

    whole, truncated = batch(Limits()), batch(Limits(**limits))
    assert truncated["input_ids"].shape[1] < whole["input_ids"].shape[1]
    shorter = 0
    for i in range(len(whole["row"])):
        mask, truncated_mask = whole["mask"][i], truncated["mask"][i]
        labels, tokens = whole["remaining"][i][mask], whole["input_ids"][i][mask]
        kept = int(truncated_mask.sum())
        shorter += kept < len(labels)
        offset = len(labels) - kept if whole["censored"][i] else 0  # counts of a censored row go to the new end
        assert torch.equal(truncated["remaining"][i][truncated_mask], labels[:kept] - offset)
        assert torch.equal(truncated["input_ids"][i][truncated_mask], tokens[:kept])
        assert labels.tolist() == list(range(len(labels) - 1, -1, -1))
        if kept == len(labels) and not whole["censored"][i]:
            assert truncated["input_ids"][i][truncated_mask][-1] == tiny_text.eos_token_id  # 0 stays at EOS
    assert (shorter > 0) == ("max_length" in limits)
    assert (truncated["remaining"][~truncated["mask"]] == 0).all()


@pytest.mark.parametrize("max_pixels", [None, 5000])
def test_image_tokens_are_as_many_as_the_collator_gives(tiny_vl, tmp_path, build, max_pixels):
    sizes = [(84, 84), (112, 56), (30, 200), (300, 300)]
    for number, size in enumerate(sizes):
        draw(tmp_path / f"{number}.png", size)
    two = {"messages": [{"role": "user", "content": "<image> and <image>?"}], "images": ["2.png", "0.png"]}
    lines = [{"messages": SEEN, "images": [f"{number}.png"], "completion": "a"} for number in range(4)]
    limits = Limits(max_pixels=max_pixels)
    table = build(tiny_vl, *lines, {**two, "completion": "b"}, max_pixels=max_pixels)
    assert not any(table["problem"])
    batch = batch_of(table, tiny_vl, limits)
    grid = batch["vision"]["image_grid_thw"].prod(dim=1) // tiny_vl.image_processor.merge_size**2
    pads = (batch["input_ids"] == tiny_vl.image_token_id).sum(dim=1).tolist()
    assert pads == [*grid[:4].tolist(), int(grid[4:].sum())]
    assert len(grid) == 6
    assert batch["vision"]["pixel_values"].shape[0] == batch["vision"]["image_grid_thw"].prod(dim=1).sum()
    if max_pixels:  # scaled to 5000 pixels or less, then to whole patches of 28 x 28
        assert max(grid.tolist()) <= 9
    else:
        assert pads[:2] == [9, 8]


def test_text_rows_among_images(tiny_vl, tmp_path, build):
    draw(tmp_path / "a.png")
    text, image = {"messages": USER, "completion": "a"}, {"messages": SEEN, "images": ["a.png"], "completion": "a"}
    table = build(tiny_vl, text, image, text)
    batch = batch_of(table, tiny_vl, Limits())
    assert (batch["input_ids"] == tiny_vl.image_token_id).sum(dim=1).tolist() == [0, 9, 0]
    assert batch["vision"]["image_grid_thw"].tolist() == [[1, 6, 6]]
    assert batch_of(table.select([0, 2]), tiny_vl, Limits())["vision"] == {}
