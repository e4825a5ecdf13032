"""The DataModules as a whole: what is held out, what is said about the data."""

import json

import pytest

from datamodules import TextRollouts
from datamodules.report import collect_facts, describe_facts


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


def facts(cut):
    lengths = [*range(10, 110), *[200] * cut]
    rows = len(lengths)
    return collect_facts(lengths, [n == 200 for n in lengths], ["a"] * rows, [""] * rows, [""] * rows)


def test_a_gamma_that_cuts_make_too_small_is_said_to_be():
    text = describe_facts(facts(cut=0), 5, 1, 0.1, 3)
    assert "gamma suggested 0.9" in text
    assert "≥" not in text
    text = describe_facts(facts(cut=1), 5, 1, 0.1, 3)  # under 1%: the percentile is known, the longest is not
    assert "99th percentile 109, longest ≥ 200" in text
    assert "at least" not in text
    text = describe_facts(facts(cut=50), 5, 1, 0.1, 3)
    assert "median 84 tokens, 99th percentile ≥ 200, longest ≥ 200" in text
    assert "gamma suggested at least 0.97724" in text
    assert "`gamma: auto` may be too small" in text
    assert "median ≥ 200 tokens" in describe_facts(facts(cut=150), 5, 1, 0.1, 3)


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


@pytest.fixture
def said(monkeypatch):
    texts = []
    monkeypatch.setattr("datamodules.rollouts.rank_zero_info", texts.append)
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
