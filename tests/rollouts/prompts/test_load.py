"""Prompts of several sources, one after the other, and mistakes in what is said of them."""

import json

import pytest

from lenvm_lightning.errors import DataError
from lenvm_lightning.rollouts.prompts import load_prompts


def test_sources_follow_each_other_each_with_its_limit(write):
    file = write("f.jsonl", *[{"prompt": str(i), "id": i} for i in range(5)])
    prompts = load_prompts(["tiny-math", {"path": file, "limit": 3}, {"source": "tiny-write", "seed": 4}], limit=2)
    assert [prompt_id.split("/")[0] for prompt_id in prompts.ids] == ["tiny-math"] * 2 + ["f"] * 3 + ["tiny-write"] * 2
    assert [prompt.prompt_id for prompt in prompts] == prompts.ids
    assert prompts[-1].prompt_id == prompts.ids[-1]
    assert [prompt.prompt_id for prompt in prompts[1:4]] == prompts.ids[1:4]
    with pytest.raises(IndexError):
        prompts[7]
    json.dumps(prompts.description)


def test_two_sources_with_the_same_ids_are_told_apart(write):
    one, two = write("a/p.jsonl", {"prompt": "a", "id": 1}), write("b/p.jsonl", {"prompt": "b", "id": 1})
    with pytest.raises(DataError, match=r"both have a prompt 'p/1'.*label"):
        load_prompts([one, two])
    assert load_prompts([one, {"path": two, "label": "q"}]).ids == ["p/1", "q/1"]


def test_mistakes_in_sources_are_named_all_at_once():
    with pytest.raises(DataError) as refused:
        load_prompts(["tiny-maht", {"surce": "x"}, {"limit": 3}, {"source": "gsm8k", "limit": "all"}, 7,
                      {"path": "a/b", "columns": {"promt": "q"}}, {"path": "a/b", "columns": {"id": "i"}},
                      {"source": "a/b", "path": "c/d"}, {"source": "gsm8k", "limit": 0},
                      {"path": "a/b", "columns": {"prompt": 3, "meta": ["a", "b"]}},
                      {"path": "a/b", "label": "half \udcff"}, "a/\udcff.jsonl"])  # fmt: skip
    text = str(refused.value)
    for said in (
        "'tiny-maht': no such source; did you mean 'tiny-math'?",
        "unknown key 'surce'; did you mean 'source'?",
        "{'limit': 3}: it has neither source nor path",
        "limit must be int, found 'all'",
        "7: a source of prompts is a name or a mapping",
        "columns: unknown 'promt'; did you mean 'prompt'?",
        "columns: give either prompt, a text, or messages, a conversation",
        "both source and path",
        "limit must be at least 1, found 0",
        "columns: prompt must be the name of a column, found 3",
        "'label': 'half \\udcff'}: it holds something that is no text",
        "'a/\\udcff.jsonl': it holds something that is no text",
    ):
        assert said in text
    with pytest.raises(DataError, match="no source"):
        load_prompts([])
