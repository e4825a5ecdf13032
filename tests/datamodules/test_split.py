"""What is trained on, and what is held out."""

import time

import pytest
from datasets import Dataset
from rollout_lines import USER, line

from datamodules.split import RowFacts, usable_rows


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


def test_facts_are_those_of_the_rows(build, tiny_text):
    """Read by columns, as they would be row by row."""
    rows = [
        {"prompt_id": "a", "messages": USER, "completion": "One.", "split": "test", "generator": "g"},
        {"prompt_id": "b", "messages": USER, "completion": ""},  # a problem
        {"messages": USER, "token_ids": [5, 9, 2], "finish_reason": "length", "sampling": {"temperature": 0.5}},
    ]
    table = build(tiny_text, *rows, b"{broken", rows[0])
    expected = [
        RowFacts(
            number, row["prompt_id"], row["split"], len(row["input_ids"]), row["prompt_length"], row["length"],
            row["censored"], row["sampling"], row["generator"],
        )
        for number, row in enumerate(table)
        if not row["problem"]
    ]  # fmt: skip
    assert usable_rows(table) == expected
    assert [row.row for row in expected] == [0, 2, 4]
    assert usable_rows(table.select([4, 1, 2])) == [expected[2]._replace(row=0), expected[1]._replace(row=2)]


def test_many_rows_are_read_at_once():
    """Row by row, ten thousand took five seconds."""
    count = 10_000
    table = Dataset.from_dict(
        {
            "input_ids": [list(range(200))] * count,
            **{name: [7] * count for name in ("prompt_length", "length")},
            **{name: [""] * count for name in ("problem", "split", "sampling", "generator")},
            "censored": [False] * count,
            "prompt_id": [f"p{row // 8}" for row in range(count)],
        }
    )
    began = time.process_time()
    assert len(usable_rows(table)) == count
    assert time.process_time() - began < 1


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
