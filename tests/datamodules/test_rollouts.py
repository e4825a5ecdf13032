"""The DataModules as a whole: what is said about the data, and what a layout does."""

from types import SimpleNamespace

import pytest
from rollout_lines import line

from datamodules import TextRollouts
from lenvm_lightning.errors import DataError


def test_completions_of_a_prompt_meet(set_up, said):
    lines = [line(f"p{i % 6}", "train") for i in range(48)] + [line("q", "test")]
    data = set_up(*lines, completions_per_batch=8, batch_tokens=512)
    for batch in data.train_dataloader().batch_sampler:
        prompts = [data.train_rows[row]["prompt_id"] for row in batch]
        assert {prompts.count(prompt) for prompt in prompts} == {8}
    assert "8.0 completions of a prompt meet in a batch" in said[-1]
    set_up(*lines, batch_tokens=512)
    assert "meet in a batch" not in said[-1]
    set_up(*lines, completions_per_batch=8, batch_tokens=100)  # holds fewer than 8 rows
    assert "8.0 completions" not in said[-1]


@pytest.mark.parametrize("truncated", [0, 18, 22, 40])
def test_truncated_completions_do_not_meet_in_batches_of_their_own(set_up, said, truncated):
    """Half truncated, all at one length: sorted by length, a batch would be all truncated or not at all."""
    texts = ["cut " * 30] * truncated + ["an answer " * (2 + i % 9) for i in range(80 - truncated)]
    reasons = ["length"] * truncated + ["stop"] * (80 - truncated)
    lines = [
        line(f"p{i}", "train", completion=text, finish_reason=reason)
        for i, (text, reason) in enumerate(zip(texts, reasons, strict=True))
    ]
    data = set_up(*lines, line("q", "test"), batch_tokens=512)
    assert data.facts.truncated_share == truncated / 80
    shares = []
    for batch in data.train_dataloader().batch_sampler:
        cut = [bool(data.train_rows[row]["censored"]) for row in batch]
        shares.append(sum(cut) / len(cut))
    mixed = sum(0 < share < 1 for share in shares) / len(shares)
    if truncated > 20:  # a quarter
        assert mixed > 0.7
        assert "batches are random" in said[-1]
        assert "layout: packed" in said[-1]
        assert set_up(*lines, line("q", "test"), batch_tokens=512, bucket=True).buckets
    else:
        assert data.buckets
    assert "batches are random" not in said[-1]


def test_what_a_layout_leaves_is_told(set_up, said):
    lines = [line(f"p{i % 6}", "train") for i in range(48)] + [line("q", "test")]
    data = set_up(*lines, completions_per_batch=8, batch_tokens=512, layout="shared")
    ((row, prompt),) = {(len(r["input_ids"]), r["prompt_length"]) for r in data.train_rows}
    share = (prompt + 8 * (row - prompt)) / (8 * row)
    assert f"layout: shared computes a prompt once a batch, which leaves {share:.1%} of the tokens" in said[-1]
    assert "few completions" not in said[-1]
    layout = next(iter(data.train_dataloader()))["layout"]
    assert layout.kind == "shared"
    assert len(layout.prompts) // 8 == max(layout.prompts) + 1
    set_up(*(line(f"p{i}", "train") for i in range(48)), line("q", "test"), layout="shared")
    assert "leaves 100.0% of the tokens: few completions of a prompt meet, set completions_per_batch" in said[-1]
    set_up(*lines, layout="packed")
    assert "of the tokens (packed)" in said[-1]


def test_a_layout_is_checked_on_rows_that_share_prompts(set_up):
    lines = [line(f"p{i % 6}", "train") for i in range(48)] + [line("q", "test")]
    assert set_up(*lines).layout_check_batches() is None
    plain, shared = set_up(*lines, layout="shared").layout_check_batches()
    assert "layout" not in plain
    assert shared["layout"].prompts == [0, 0, 1, 1]
    assert plain["row"].tolist() == shared["row"].tolist()


def test_fewer_held_out_rows_than_ranks(text_rollouts):
    data = TextRollouts(str(text_rollouts), processor="tiny-text")
    data.setup()
    data.trainer = SimpleNamespace(global_rank=0, world_size=5)
    assert len(data.val_sizes) == 4
    with pytest.raises(DataError, match="held out: 4 rows cannot fill 5 batches; use fewer devices"):
        data.val_dataloader()
    data.trainer.world_size = 3
    seen = []
    for data.trainer.global_rank in range(3):
        batches = list(data.val_dataloader().batch_sampler)
        seen += [row for batch in batches for row in batch]
        assert len(batches) == 1
    assert sorted(seen) == [0, 1, 2, 3]
