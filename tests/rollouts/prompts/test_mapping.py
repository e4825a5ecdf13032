"""Rows to prompts: what they say themselves, and columns that are named."""

from pathlib import Path

import pytest
from prompt_rows import make_image

from lenvm_lightning.errors import DataError
from lenvm_lightning.rollouts.prompts import load_prompts
from lenvm_lightning.rollouts.prompts.mapping import fill, read_turns
from lenvm_lightning.rollouts.record import parse_record


def test_rows_say_themselves_what_they_hold(write, tmp_path):
    make_image().save(tmp_path / "p.png")
    file = write(
        "mine.jsonl",
        {"prompt": "Why?", "id": 7, "meta": {"gold": 4}, "split": "train", "difficulty": "hard"},
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How?"}], "id": "x"},
        {
            "conversations": [
                {"from": "human", "value": "Where? <image>"}, {"from": "gpt", "value": "Here."},
                {"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}, {"from": "gpt", "value": "No."},
            ],
            "images": ["p.png"],
            "meta_info": {"lenvm_idx": 3, "dataset_name": "places", "split": "test"},
        },
        {"prompt": "What is this?", "image": "p.png"},
    )  # fmt: skip
    prompts = load_prompts(file)
    assert prompts.ids[:3] == ["mine/7", "mine/x", "mine/places/3"]
    first, second, third, last = prompts
    assert (first.messages, first.meta, first.split) == ([{"role": "user", "content": "Why?"}], {"gold": 4}, "train")
    assert [message["role"] for message in second.messages] == ["system", "user"]
    assert [message["content"] for message in third.messages] == ["Where? <image>", "Here.", "Sure?"]
    assert third.images == (str(tmp_path / "p.png"),)
    assert third.split == "test"
    assert last.messages[0]["content"] == "<image>What is this?"
    assert (last.images, last.split) == (third.images, None)


def test_completions_of_one_prompt_are_one_prompt(write):
    row = {"prompt_id": "a", "messages": [{"role": "user", "content": "?"}]}
    file = write("r.jsonl", *[{**row, "number": i, "completion": f"{i}", "token_ids": [i]} for i in range(4)])
    assert load_prompts(file).ids == ["r/a"]
    file = write("r.jsonl", *[{"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": str(i)}]} for i in range(4)])  # fmt: skip # noqa: E501
    assert len(load_prompts(file)) == 1


def test_columns_of_files_can_be_named(write, tmp_path):
    make_image().save(tmp_path / "p.png")
    row = {"q": "How many?", "opts": ["one", "two"], "pic": "p.png", "nr": 5, "gold": "A", "level": 2, "part": "val"}
    columns = {"prompt": "q", "options": "opts", "image": "pic", "id": "nr", "split": "part", "meta": ["gold", "level"]}
    file = write("m.jsonl", row)
    (prompt,) = load_prompts({"path": file, "columns": columns, "template": "Level {level}, \\boxed{}: {prompt}"})
    assert prompt.messages == [
        {"role": "user", "content": "<image>Level 2, \\boxed{}: How many?\nChoices:\n(A) one\n(B) two"}
    ]
    assert (prompt.prompt_id, prompt.split, prompt.meta) == ("m/5", "test", {"gold": "A", "level": 2})
    with pytest.raises(DataError, match=r"no column 'opt'; did you mean 'opts'\? \(it has q, opts"):
        load_prompts({"path": file, "columns": {"prompt": "opt"}})
    with pytest.raises(DataError, match=r"no column 'levle'; did you mean 'level'"):
        load_prompts({"path": file, "columns": columns, "template": "{levle} {prompt}"})


def test_a_mark_without_an_image_is_only_a_word(write):
    """Or the record of such a prompt could not be read again."""
    (prompt,) = load_prompts(write("w.jsonl", {"prompt": "What does <image> mean in SVG?"}))
    assert prompt.messages[0]["content"] == "What does < image> mean in SVG?"
    record = {"prompt_id": prompt.prompt_id, "messages": prompt.messages, "completion": "An image."}
    assert len(parse_record(record, Path())[0]) == 1


def test_templates_leave_latex_alone():
    assert fill("\\boxed{}: {prompt}", {"prompt": "$x^{2}$ {a}"}) == "\\boxed{}: $x^{2}$ {a}"
    assert fill("\\frac{{a}}{{b}} {prompt}", {"prompt": "?"}) == "\\frac{a}{b} ?"
    with pytest.raises(ValueError, match=r"\{promt\} is neither .* did you mean 'prompt'"):
        fill("{promt}", {"prompt": ""})


def test_conversations_end_with_a_question():
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert read_turns(turns) == turns
    assert read_turns(turns, first_turn=True) == turns[:1]
    assert read_turns(turns[:2]) == turns[:1]
    with pytest.raises(ValueError, match="nobody asks"):
        read_turns(turns[1:2])
