"""Both layouts of the rollout record, what they are taken for, and how their mistakes are named."""

from pathlib import Path

import pytest

from lenvm_lightning.rollouts import Rollout, parse_record

FOLDER = Path("/data/run")
USER = [{"role": "user", "content": "q"}]
HUMAN = [{"from": "human", "value": "q"}]
GPT = {"from": "gpt", "value": "a"}


def parse(record):
    return parse_record(record, FOLDER)[0]


def test_own_layout():
    record = {
        "prompt_id": 7,
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "<image>q<image>"}],
        "images": ["a.png", "/b.png"], "completion": "Three.", "token_ids": [5, 9, 2], "finish_reason": "stop",
        "split": "train", "sampling": {"temperature": 1.0}, "generator": "g", "logprob": -1.0, "correct": True,
        "meta": {},
    }  # fmt: skip
    expected = Rollout(
        "7", record["messages"], ["/data/run/a.png", "/b.png"], "Three.", [5, 9, 2], False, "train",
        {"temperature": 1.0}, "g",
    )  # fmt: skip
    assert parse_record(record, FOLDER) == ([expected], [])


def test_published_layout():
    record = {
        "conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "<image>q"}, GPT],
        "images": "a.png",
        "meta_info": {
            "answer_token_length": 2, "lenvm_idx": 0, "split": "test", "dataset_name": "d", "model_name": "m",
            "temperature": 1.0, "top_p": 1.0, "top_k": None, "max_tokens": 512,
        },
        "source_fields": {}, "id": "x",
    }  # fmt: skip
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "<image>q"}]
    sampling = {"temperature": 1.0, "top_p": 1.0, "max_tokens": 512}
    expected = Rollout("d/0", messages, ["/data/run/a.png"], "a", None, False, "test", sampling, "m")
    assert parse_record(record, FOLDER) == ([expected], [])


def test_own_layout_grouped():
    items = [{"completion": "a"}, {"token_ids": [1, 2], "finish_reason": "length"}, {"completion": "b", "correct": 1}]
    rollouts = parse({"prompt_id": "p", "messages": USER, "completions": items})
    assert [(r.prompt_id, r.completion, r.token_ids, r.censored) for r in rollouts] == [
        ("p", "a", None, False), ("p", "", [1, 2], True), ("p", "b", None, False),
    ]  # fmt: skip


def test_published_layout_grouped_by_turns_and_by_list():
    turns = parse({"conversations": [*HUMAN, GPT, {"from": "gpt", "value": "b"}], "meta_info": {"lenvm_idx": 3}})
    lines = parse(
        [{"conversations": [*HUMAN, {"from": "gpt", "value": v}], "meta_info": {"lenvm_idx": 3}} for v in "ab"]
    )
    assert turns == lines
    assert [r.completion for r in turns] == ["a", "b"]
    assert turns[0].messages == USER


def test_earlier_answers_belong_to_the_prompt():
    (rollout,) = parse({"conversations": [*HUMAN, GPT, *HUMAN, {"from": "gpt", "value": "b"}]})
    assert rollout.completion == "b"
    assert [m["role"] for m in rollout.messages] == ["user", "assistant", "user"]


def test_prompt_id_of_content():
    ids = [
        parse({"messages": [{"role": "user", "content": text}], "images": images, "completion": answer})[0].prompt_id
        for text, images, answer in [
            ("<image>q", ["a"], "1"), ("<image>q", ["a"], "2"), ("<image>q", ["b"], "1"), ("<image>r", ["a"], "1"),
        ]
    ]  # fmt: skip
    assert ids[0] == ids[1]
    assert len(set(ids)) == 3


@pytest.mark.parametrize(
    ("meta", "censored"),
    [
        ({}, False),
        ({"answer_token_length": 511, "max_tokens": 512}, False),
        ({"answer_token_length": 512, "max_tokens": 512}, True),
        ({"answer_token_length": 512.0, "max_tokens": 512.0}, True),
        ({"answer_token_length": 512}, False),
        ({"max_tokens": 512}, False),
        ({"answer_token_length": 512, "max_tokens": 512, "finish_reason": "stop"}, False),
        ({"answer_token_length": 3, "max_tokens": 512, "finish_reason": "length"}, True),
    ],
)
def test_published_completion_at_its_limit_was_cut(meta, censored):
    assert parse({"conversations": [*HUMAN, GPT], "meta_info": meta})[0].censored is censored


GROUP = [*HUMAN, GPT, {"from": "gpt", "value": "b"}]


@pytest.mark.parametrize(
    ("meta", "censored", "notes"),
    [
        ({"answer_token_length": [512, 3], "max_tokens": 512}, [True, False], []),
        ({"answer_token_length": [None, 512], "max_tokens": 512}, [False, True], []),
        ({"finish_reason": ["stop", "length"]}, [False, True], []),
        ({"answer_token_length": [512, 512], "max_tokens": 512, "finish_reason": ["stop", None]}, [False, True], []),
        (
            {"answer_token_length": 512, "max_tokens": 512},
            [False, False],
            ["answer_token_length is one value for 2 completions, so it says of none whether it was truncated"],
        ),
        (
            {"finish_reason": "length"},
            [False, False],
            ["finish_reason is one value for 2 completions, so it says of none whether it was truncated"],
        ),
        ({"answer_token_length": 512}, [False, False], []),
        ({"finish_reason": "stop", "max_tokens": 512}, [False, False], []),
    ],
)
def test_one_value_does_not_decide_for_a_group(meta, censored, notes):
    rollouts, found = parse_record({"conversations": GROUP, "meta_info": meta}, FOLDER)
    assert [r.censored for r in rollouts] == censored
    assert found == notes


def test_the_seed_of_a_completion_is_no_setting():
    record = {"messages": USER, "completion": "a", "number": 3, "reencoded": True, "sampling": {"top_p": 1, "seed": 5}}
    (rollout,), notes = parse_record(record, FOLDER)
    assert rollout.sampling == {"top_p": 1}
    assert notes == []


def test_null_entries_are_absent():
    absent = dict.fromkeys(["images", "token_ids", "finish_reason", "split", "sampling", "generator", "prompt_id"])
    assert parse({"messages": USER, "completion": "a", **absent}) == parse({"messages": USER, "completion": "a"})
    items = [{"completion": "a", "token_ids": None, "finish_reason": None}]
    assert parse({"messages": USER, "completions": items}) == parse({"messages": USER, "completion": "a"})
    published = {"conversations": [*HUMAN, GPT]}
    assert parse({**published, "meta_info": None, "images": None}) == parse(published)


@pytest.mark.parametrize(
    ("record", "notes"),
    [
        (
            {"messages": USER, "completion": "a", "finish_reson": "length"},
            ["unknown key 'finish_reson'; did you mean 'finish_reason'?"],
        ),
        (
            {"messages": USER, "completions": [{"completion": "a", "finish_reson": "length"}] * 2},
            ["unknown key 'finish_reson'; did you mean 'finish_reason'?"],
        ),
        ({"messages": USER, "completion": "a", "zzz": 1}, ["unknown key 'zzz'"]),
        ({"conversations": [*HUMAN, GPT], "image": []}, ["unknown key 'image'; did you mean 'images'?"]),
        ([{"conversations": [*HUMAN, GPT], "zzz": []}, {"conversations": [*HUMAN, GPT]}], ["unknown key 'zzz'"]),
    ],
)
def test_unknown_keys_are_noted(record, notes):
    assert parse_record(record, FOLDER)[1] == notes


@pytest.mark.parametrize(
    ("record", "text"),
    [
        (5, "expected a JSON object, found int"),
        ([], "the list is empty"),
        ([[{}]], "neither 'messages' nor 'conversations' among its keys ()"),
        ({"mesages": USER, "completion": "a"}, "among its keys (mesages, completion); did you mean 'messages'?"),
        ({"conversation": [], "id": 1}, "(conversation, id); did you mean 'conversations'?"),
        ({"messages": []}, "the conversation is empty or not a list"),
        ({"messages": "q"}, "the conversation is empty or not a list"),
        ({"messages": ["q"]}, "a turn of the conversation is str, expected an object"),
        (
            {"messages": [{"role": "usr", "content": "q"}]},
            "unknown role 'usr'; did you mean 'user'? (known: system, human, user, gpt, assistant)",
        ),
        ({"messages": [{"role": ["user"], "content": "q"}]}, "unknown role ['user']"),
        ({"messages": [{"role": "user", "content": [1]}]}, "the text of a user turn is list, expected a string"),
        ({"messages": USER}, "neither 'completion' nor 'token_ids'"),
        ({"messages": USER, "completon": "a"}, "neither 'completion' nor 'token_ids'; did you mean 'completion'?"),
        ({"messages": USER, "completions": [{"token_id": [1]}]}, "did you mean 'token_ids'?"),
        ({"messages": USER, "completions": []}, "completions is empty"),
        ({"messages": USER, "completions": ["a"]}, "a completion in completions is str, expected an object"),
        ({"messages": USER, "completions": {"completion": "a"}}, "completions is dict, expected a list"),
        ({"messages": USER, "completion": ["a"]}, "completion is list, expected a string"),
        (
            {"messages": USER, "completion": "a", "finish_reason": "lenght"},
            "unknown finish_reason 'lenght'; did you mean 'length'? (known: stop, length)",
        ),
        ({"messages": USER, "token_ids": [1, "2"]}, "token_ids is not a list of whole numbers from 0 to 2147483647"),
        ({"messages": USER, "token_ids": [1, -2]}, "token_ids is not a list of whole numbers from 0 to 2147483647"),
        ({"messages": USER, "token_ids": [1, True]}, "token_ids is not a list of whole numbers from 0 to 2147483647"),
        ({"messages": USER, "token_ids": [2**70]}, "token_ids is not a list of whole numbers from 0 to 2147483647"),
        ({"messages": USER, "completion": "a\ud800"}, "completion holds half a character (a lone surrogate) at 1"),
        ({"messages": USER, "token_ids": [1.0]}, "token_ids is not a list of whole numbers from 0 to 2147483647"),
        ({"messages": USER, "completion": "a", "sampling": [1]}, "sampling is list, expected an object"),
        ({"messages": USER, "completion": "a", "split": 1}, "split is int, expected a string"),
        ({"messages": USER, "completion": "a", "images": ["x"]}, "0 <image> marks in the prompt but 1 images"),
        ({"messages": USER, "completion": "a", "images": [5]}, "images is not a list of paths"),
        ({"conversations": [{"from": "human", "value": "<image>"}, GPT]}, "1 <image> marks in the prompt but 0 images"),
        ({"conversations": HUMAN}, "the conversation does not end with a gpt turn"),
        ({"conversations": [GPT]}, "there is no prompt before the gpt turn"),
        ({"conversations": [*HUMAN, GPT], "meta_info": [1]}, "meta_info is list, expected an object"),
        (
            {"conversations": [*HUMAN, GPT], "meta_info": {"answer_token_length": "3", "max_tokens": 5}},
            "answer_token_length is str, expected a number",
        ),
        (
            {"conversations": [*HUMAN, GPT, GPT], "meta_info": {"answer_token_length": [3], "max_tokens": 5}},
            "answer_token_length has 1 entries for 2 completions",
        ),
        (
            {"conversations": [*HUMAN, GPT], "meta_info": {"finish_reason": [3]}},
            "an entry of finish_reason is int, expected a string",
        ),
    ],
)
def test_errors_say_what_and_where(record, text):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (its text is compared below)
        parse(record)
    assert text in str(caught.value)
