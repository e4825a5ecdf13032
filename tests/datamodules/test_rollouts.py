"""The DataModules as a whole: what is said about the data, and what a layout does."""

from rollout_lines import line
from rollout_rows import row_facts

from datamodules.report import BatchFacts, collect_facts, describe_facts


def described(truncated):
    """What is said of 100 completions of 10 to 109 tokens, and some truncated at 200."""
    rows = row_facts([*range(10, 110), *[200] * truncated], censored=lambda length: length == 200)
    return describe_facts(collect_facts(rows), BatchFacts(count=3, padding=0.1), held_out=5, held_out_prompts=1)


def test_a_gamma_that_truncation_makes_too_small_is_said_to_be():
    text = described(truncated=0)
    assert "gamma suggested 0.9" in text
    assert "≥" not in text
    text = described(truncated=1)  # under 1%: the percentile is known, the longest is not
    assert "99th percentile 109, longest ≥ 200" in text
    assert "at least" not in text
    text = described(truncated=50)
    assert "median 84 tokens, 99th percentile ≥ 200, longest ≥ 200" in text
    assert "gamma suggested at least 0.97724" in text
    assert "`gamma: auto` may be too small" in text
    assert "median ≥ 200 tokens" in described(truncated=150)


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
