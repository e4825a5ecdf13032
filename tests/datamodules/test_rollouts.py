"""The DataModules as a whole: what is held out, what is said about the data."""

import json

import pytest
from rollout_rows import row_facts

from datamodules import TextRollouts, VisionRollouts
from datamodules.report import BatchFacts, collect_facts, describe_facts
from lenvm_lightning.errors import DataError


def line(prompt, split=None, **more):
    record = {"prompt_id": prompt, "messages": [{"role": "user", "content": f"Say {prompt}."}], "completion": "Yes."}
    return json.dumps({**record, **({"split": split} if split else {}), **more}) + "\n"


@pytest.fixture
def set_up(tmp_path):
    def set_up(*lines, **settings):
        file = tmp_path / "rollouts.jsonl"
        file.write_text("".join(lines))
        data = TextRollouts(str(file), processor="tiny-text", cache_dir=str(tmp_path / "cache"), **settings)
        data.setup("fit")
        return data

    return set_up


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


@pytest.mark.parametrize("split", ["test", "val", "validation", "dev", "eval", "testmini"])
def test_a_split_of_any_usual_name_is_held_out(set_up, split):
    data = set_up(*(line(f"p{i}", "train") for i in range(30)), line("p30", split), line("p31", split))
    assert [data.val_rows[i]["prompt_id"] for i in range(len(data.val_rows))] == ["p30", "p31"]
    assert len(data.train_rows) == 30


def test_without_such_a_split_a_share_of_the_prompts_is(set_up):
    data = set_up(*(line(f"p{i}", "train") for i in range(30) for _ in range(2)), val_share=0.3)
    held, trained = ({rows[i]["prompt_id"] for i in range(len(rows))} for rows in (data.val_rows, data.train_rows))
    assert held
    assert held.isdisjoint(trained)
    assert data.val_prompts == len(held)


def ids(rows):
    return [rows[i]["prompt_id"] for i in range(len(rows))]


def mixed():
    """Five training prompts with 3, 1, 3, 3 and 2 completions, not in a row, and two held-out ones."""
    order = ["p0", "p1", "p0", "q0", "p2", "p3", "p2", "p0", "q1", "p4", "p3", "p2", "p3", "q0", "p4"]
    return [
        line(prompt, "test" if prompt[0] == "q" else "train", completion=f"Yes {number}.")
        for number, prompt in enumerate(order)
    ]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ["p0", "p1", "p0", "p2", "p3", "p2", "p0", "p4", "p3", "p2", "p3", "p4"]),
        ({"train_prompts": 2}, ["p0", "p1", "p0", "p0"]),
        ({"train_prompts": 3}, ["p0", "p1", "p0", "p2", "p2", "p0", "p2"]),
        ({"train_completions": 1}, ["p0", "p1", "p2", "p3", "p4"]),
        ({"train_completions": 2}, ["p0", "p1", "p0", "p2", "p3", "p2", "p4", "p3", "p4"]),
        ({"train_prompts": 3, "train_completions": 2}, ["p0", "p1", "p0", "p2", "p2"]),
    ],
)
def test_only_so_many_are_trained_on(set_up, said, settings, expected):
    whole, part = set_up(*mixed()), set_up(*mixed(), **settings)
    assert ids(part.train_rows) == expected
    assert len(part.train_sizes) == part.facts.completions == len(expected)
    assert part.facts.prompts == len(set(expected))
    assert f"Rollouts: {len(expected)} completions of {len(set(expected))} prompts to train on, 3 of 2 h" in said[-1]
    # The first completions in the order of the table, and the same held-out ones.
    texts = [[rows[i]["input_ids"].tolist() for i in range(len(rows))] for rows in (whole.train_rows, part.train_rows)]
    places = [texts[0].index(text) for text in texts[1]]
    assert places == sorted(set(places))
    first = {prompt: [i for i, p in enumerate(ids(whole.train_rows)) if p == prompt] for prompt in set(expected)}
    assert places == sorted(i for p in first for i in first[p][: expected.count(p)])
    assert ids(part.val_rows) == ids(whole.val_rows) == ["q0", "q1", "q0"]
    assert part.val_sizes == whole.val_sizes
    assert sorted(row for batch in part.train_dataloader().batch_sampler for row in batch) == list(range(len(expected)))


def test_a_share_held_out_stays_the_same(set_up):
    lines = [line(f"p{i}", "train") for i in range(30) for _ in range(2)]
    whole = set_up(*lines, val_share=0.3)
    part = set_up(*lines, val_share=0.3, train_prompts=4, train_completions=1)
    assert ids(part.val_rows) == ids(whole.val_rows)
    assert ids(part.train_rows) == ids(whole.train_rows)[:8:2]


def test_asking_for_more_than_there_are_is_told_of(set_up, said):
    data = set_up(*mixed(), train_prompts=9, train_completions=3)
    assert len(data.train_rows) == 12
    assert "train_prompts asks for 9 prompts to train on, there are 5" in said
    assert "train_completions asks for 3 completions of each prompt, 2 of the 5 training prompts have fewer" in said
    said.clear()
    set_up(*mixed(), train_prompts=5, train_completions=1)
    set_up(*mixed(), train_prompts=1, train_completions=3)
    assert not any("asks for" in text for text in said)


def test_prompts_left_out_are_not_trained_on_too(set_up, said):
    lines = [*(line(f"p{i}", "train") for i in range(5)), line("p3", "test"), line("p9", "test")]
    set_up(*lines, train_prompts=3)
    assert not any("trained on too" in text for text in said)


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


@pytest.fixture
def said(monkeypatch):
    texts = []
    monkeypatch.setattr("datamodules.rollouts.rank_zero_info", texts.append)
    monkeypatch.setattr("datamodules.split.rank_zero_info", texts.append)
    return texts


def test_prompts_on_both_sides_are_told_of(set_up, said):
    set_up(*(line(f"p{i}", "train") for i in range(5)), line("p3", "test"), line("p9", "test"))
    assert any(
        "1 of the held-out prompts are trained on too, going by prompt_id, such as 'p3'" in text for text in said
    )
    said.clear()
    set_up(*(line(f"p{i}", "train") for i in range(5)), line("p9", "test"))
    assert not any("trained on too" in text for text in said)


def test_a_split_that_nobody_knows_is_told_of(set_up, said):
    data = set_up(*(line(f"p{i}", "tets") for i in range(5)), line("p9", "test"))
    assert len(data.train_rows) == 5
    assert any("split 'tets' is neither train nor test: it counts as train" in text for text in said)
