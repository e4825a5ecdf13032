"""Rollouts to the published layout and back, flat and grouped: what stays, what is lost, what is refused."""

import json
from itertools import groupby
from pathlib import Path

import pytest
from PIL import Image
from scripted import SAMPLING, Prompts, make_prompts

from datamodules.tokenise import Limits, encode_rollout
from lenvm_lightning.cli.main import main
from lenvm_lightning.errors import DataError, StoreError
from lenvm_lightning.rollouts.generators.interface import Answer, GeneratedText
from lenvm_lightning.rollouts.published_format import convert
from lenvm_lightning.rollouts.record import Rollout, parse_record
from lenvm_lightning.rollouts.sample import sample_rollouts


class Writer:
    """Writes the tokens of real words, so that text and ids say the same."""

    name = "writer"
    tokens_written = 0

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer

    def fingerprint(self):
        return {"kind": "writer"}

    def sample(self, requests, sampling):
        for request in requests:
            for number in request.numbers:
                words = " ".join(f"{i} + {number} = {i + number}." for i in range(3 * number + 1))
                ids = [*self.tokenizer(words)["input_ids"], self.tokenizer.eos_token_id]
                truncated = len(ids) > sampling.max_tokens
                ids = ids[: sampling.max_tokens]
                text = self.tokenizer.decode(ids, skip_special_tokens=True)
                result = GeneratedText(text, ids, "length" if truncated else "stop", -1.0, number)
                yield Answer(request.prompt.prompt_id, number, result)


@pytest.fixture(scope="module")
def sampled(tmp_path_factory, tiny_text) -> Path:
    """A folder of completions of eight prompts, images among them, some of them truncated."""
    prompts = Prompts([*make_prompts(6), *make_prompts(8, with_images=True)[6:]])
    folder = tmp_path_factory.mktemp("sampled")
    sample_rollouts(Writer(tiny_text), prompts, 3, folder, SAMPLING)
    return folder


def read(file: Path) -> list[Rollout]:
    parsed = [parse_record(json.loads(line), file.parent) for line in file.open()]
    assert [note for _, notes in parsed for note in notes] == []
    return [rollout for rollouts, _ in parsed for rollout in rollouts]


@pytest.mark.parametrize("grouped", [False, True])
def test_there_and_back(sampled, tmp_path, tiny_text, tiny_vl, grouped):
    there, back = tmp_path / "a" / "published.jsonl", tmp_path / "back.jsonl"
    assert convert(sampled, there, to="published", grouped=grouped) == 24
    assert convert(there, back, to="ours") == 24
    ours = read(sampled / "rollouts.jsonl")
    assert len(there.read_text().splitlines()) == (8 if grouped else 24)
    assert any(r.censored for r in ours)
    assert not all(r.censored for r in ours)
    for rollouts in (read(there), read(back)):
        assert all(r.token_ids is None for r in rollouts)  # the loss
        for name in ("prompt_id", "messages", "completion", "censored", "split", "sampling", "generator"):
            assert [getattr(r, name) for r in rollouts] == [getattr(r, name) for r in ours]
        assert [len(list(group)) for _, group in groupby(r.prompt_id for r in rollouts)] == [3] * 8
        for mine, theirs in zip(ours, rollouts, strict=True):
            processor = tiny_vl if mine.images else tiny_text
            rows = [encode_rollout(processor, r, Limits(), {})[0] for r in (mine, theirs)]
            assert rows[0]["length"] == rows[1]["length"]
            assert rows[0]["input_ids"] == rows[1]["input_ids"]
            assert [Image.open(p).tobytes() for p in mine.images] == [Image.open(p).tobytes() for p in theirs.images]
    numbers = [json.loads(line)["number"] for line in back.open()]
    assert numbers == [0, 1, 2] * 8


def test_published_lines_look_as_published_ones_do(sampled, tmp_path):
    target = tmp_path / "published.jsonl"
    convert(sampled / "rollouts.jsonl", target, to="published")
    ours = [json.loads(line) for line in (sampled / "rollouts.jsonl").open()]
    for line, mine in zip(map(json.loads, target.open()), ours, strict=True):
        assert line.keys() == {"conversations", "meta_info", "source_fields"} | ({"images"} & mine.keys())
        assert [turn["from"] for turn in line["conversations"]] == ["human", "gpt"]
        meta = line["meta_info"]
        assert meta["answer_token_length"] == len(mine["token_ids"])
        assert (meta["lenvm_idx"], meta["finish_reason"]) == (mine["prompt_id"], mine["finish_reason"])
        assert (meta["model_name"], meta["max_tokens"], meta["split"]) == ("writer", 40, mine["split"])
        assert line["source_fields"] == mine["meta"]


def test_published_lines_are_regrouped_as_they_are(tmp_path):
    lines = [
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": text}], "id": text,
         "meta_info": {"lenvm_idx": index, "answer_token_length": 3}}
        for index, text in [(0, "a"), (0, "b"), (1, "c")]
    ]  # fmt: skip
    flat, grouped, again = (tmp_path / name for name in ("flat.jsonl", "grouped.jsonl", "again.jsonl"))
    flat.write_text("".join(json.dumps(line) + "\n\n" for line in lines))
    assert convert(flat, grouped, to="published", grouped=True) == 3
    assert [json.loads(line) for line in grouped.open()] == [lines[:2], lines[2:]]
    assert convert(grouped, again, to="published") == 3
    assert [json.loads(line) for line in again.open()] == lines


def test_our_grouped_records_are_published_one_by_one(tmp_path):
    source, target = tmp_path / "ours.jsonl", tmp_path / "published.jsonl"
    items = [{"completion": "a", "token_ids": [1, 2]}, {"completion": "b", "finish_reason": "length"}]
    source.write_text(json.dumps({"messages": [{"role": "user", "content": "q"}], "completions": items}))
    assert convert(source, target, to="published") == 2
    meta = [json.loads(line)["meta_info"] for line in target.open()]
    assert [m["answer_token_length"] for m in meta] == [2, None]
    assert [m["finish_reason"] for m in meta] == ["stop", "length"]
    assert meta[0]["lenvm_idx"] == meta[1]["lenvm_idx"] == read(source)[0].prompt_id


def test_all_problems_at_once_and_nothing_written(tmp_path):
    source, target = tmp_path / "ours.jsonl", tmp_path / "published.jsonl"
    good = {"messages": [{"role": "user", "content": "q"}], "completion": "a"}
    ids_only = {"messages": good["messages"], "token_ids": [1]}
    source.write_text("\n".join(["{broken", json.dumps(good), json.dumps(ids_only), json.dumps({"mesages": []})]))
    with pytest.raises(DataError) as caught:
        convert(source, target, to="published")
    for words in (
        "ours.jsonl:1: it is not JSON",
        "ours.jsonl:3: it has token ids only",
        "ours.jsonl:4: neither 'messages'",
    ):
        assert words in str(caught.value)
    assert list(tmp_path.iterdir()) == [source]


def test_lists_of_lists_and_other_names_of_roles_are_converted(tmp_path):
    source, target = tmp_path / "ours.jsonl", tmp_path / "published.jsonl"
    record = {
        "messages": [
            {"role": "human", "content": "q"},
            {"role": "gpt", "content": "a"},
            {"role": "user", "content": "?"},
        ]
    }
    source.write_text(json.dumps([[{**record, "completion": "a"}], {**record, "completion": "b"}]))
    assert convert(source, target, to="published") == 2
    (first, _) = (json.loads(line) for line in target.open())
    assert [turn["from"] for turn in first["conversations"]] == ["human", "gpt", "human", "gpt"]
    assert (
        [rollout.completion for rollout in read(target)]
        == [rollout.completion for rollout in read(source)]
        == ["a", "b"]
    )


def test_what_is_in_the_way(sampled, tmp_path):
    (tmp_path / "journal.jsonl").write_text("")
    for source, target, options, words in (
        (tmp_path, tmp_path / "x.jsonl", {}, "sampling is not complete, the command that began it finishes it"),
        (tmp_path / "nowhere.jsonl", tmp_path / "x.jsonl", {}, "there are no rollouts at"),
        (sampled, tmp_path / "journal.jsonl", {}, "is there already"),
        (sampled, tmp_path / "x.jsonl", {"to": "ours", "grouped": True}, "only the published layout"),
        (sampled, tmp_path / "journal.jsonl" / "x.jsonl", {}, "cannot be written: "),
    ):
        with pytest.raises(StoreError, match=words):
            convert(source, target, **{"to": "published", **options})


def test_command(sampled, tmp_path, capsys):
    target = tmp_path / "p.jsonl"
    assert main(["convert", str(sampled), str(target), "--grouped"]) == 0
    assert "24 completions" in capsys.readouterr().out
    assert len(target.read_text().splitlines()) == 8
    assert main(["convert", str(sampled), str(target)]) == 2
    assert "is there already" in capsys.readouterr().err


def test_a_stop_without_an_end_is_noted(tiny_text):
    messages = [{"role": "user", "content": "q"}]
    for ids, censored, noted in (
        ([5, 9], False, True),
        ([5, 9], True, False),
        ([5, tiny_text.eos_token_id], False, False),
        ([5, tiny_text.pad_token_id], False, False),  # a model may end with another special token than its tokenizer's
        (None, False, False),
    ):
        rollout = Rollout("p", messages, [], "5", ids, censored)
        notes = encode_rollout(tiny_text, rollout, Limits(), {})[1]
        assert notes == ["it counts as ended by itself, but its last token, 9, is no end of sequence"] * noted
