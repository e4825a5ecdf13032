"""The tiny world: its tokenizer, its model folders and its rollouts. Nothing here needs a network."""

import json
import re
import unicodedata
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

from lenvm_lightning import tinyworld
from lenvm_lightning.errors import DataError
from lenvm_lightning.rollouts.constraint import CONSTRAINTS
from lenvm_lightning.tinyworld import arithmetic, build, corpus, prompt_sets, rollouts, shapes, writing
from lenvm_lightning.tinyworld.tokenizer import SPECIAL_TOKENS, build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    """Return the shipped tokenizer as a user loads it."""
    return AutoTokenizer.from_pretrained(tinyworld.path("tiny-text"))


@pytest.fixture(scope="module")
def processor():
    """Return the shipped processor as a user loads it."""
    return AutoProcessor.from_pretrained(tinyworld.path("tiny-vl"))


@pytest.fixture(scope="module", params=["text", "vision"])
def written(request, tmp_path_factory) -> tuple[str, Path, list[dict]]:
    """Write the default number of rollouts of each kind once: kind, file, records."""
    file = rollouts.write_rollouts(request.param, tmp_path_factory.mktemp(request.param))
    return request.param, file, [json.loads(line) for line in file.read_text().splitlines()]


def test_unknown_name_is_refused():
    with pytest.raises(ValueError, match="tiny-text, tiny-vl"):
        tinyworld.path("tiny-audio")


def test_shipped_folders_equal_a_rebuild(tmp_path):
    build.build(tmp_path)
    for name in tinyworld.NAMES:
        files = [file for file in tinyworld.path(name).iterdir() if file.suffix != ".safetensors"]
        shipped = {file.name: file.read_text(encoding="utf-8") for file in files}
        rebuilt = {file.name: file.read_text(encoding="utf-8") for file in (tmp_path / name).iterdir()}
        assert shipped == rebuilt
    assert sum(len(text.encode()) for text in shipped.values()) < 300_000


@pytest.mark.parametrize(
    "text",
    [
        "",
        " two  spaces,\ttab\r\n\n and a newline \n",
        "naïve façade Ωmega 你好 שלום 🙂👩‍👩‍👧 \u200b\ufeff\x00\x7f",
        "".join(chr(code) for code in range(256)),
        "\\frac{1}{2} $x^{2}$ \\boxed{\\text{12.5 cm}}",
    ],
)
def test_any_nfc_text_comes_back(tokenizer, text):
    text = unicodedata.normalize("NFC", text)
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_random_code_points_come_back(tokenizer):
    rng = Random(0)
    codes = [rng.randrange(0x110000) for _ in range(999)]
    text = "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)  # surrogates are no text
    text = unicodedata.normalize("NFC", text)
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_tokenizer_layout(tokenizer):
    assert len(tokenizer) == 2048 == AutoConfig.from_pretrained(tinyworld.path("tiny-text")).vocab_size
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(2041, 2048))
    assert set(tokenizer.all_special_tokens) == set(SPECIAL_TOKENS)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert [tokenizer.decode([i]) for i in tokenizer("3.14159").input_ids] == list("3.14159")
    for sentence in ("So the answer is", " the area of the triangle", " there are more than"):
        assert len(tokenizer(sentence).input_ids) == len(sentence.split())


def test_built_tokenizer_is_the_shipped_one(tokenizer):
    built = build_tokenizer()
    text = "Wait, 12 * 3 = 36<|im_end|>\n<|im_start|>"
    assert built.get_vocab() == tokenizer.get_vocab()
    assert built(text).input_ids == tokenizer(text).input_ids
    assert built.chat_template == tokenizer.chat_template


def test_chat_template(tokenizer):
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]}
    assert tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>How many?<|im_end|>\n<|im_start|>assistant\n"
    )
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nu<|im_end|>\n"
    )


def test_text_model_runs(tokenizer):
    config = AutoConfig.from_pretrained(tinyworld.path("tiny-text"))
    assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    batch = tokenizer(["one two three", "one"], padding=True, return_tensors="pt")
    with torch.no_grad():
        assert AutoModel.from_config(config)(**batch).last_hidden_state.shape == (*batch["input_ids"].shape, 128)
        assert AutoModelForCausalLM.from_config(config)(**batch).logits.shape[-1] == 2048


@pytest.mark.parametrize("side", ["left", "right"])
def test_vision_model_runs(processor, side):
    config = AutoConfig.from_pretrained(tinyworld.path("tiny-vl"))
    sizes = [(84, 84), (112, 112), (500, 300), (20, 20)]
    tokens = [9, 16, 15, 4]  # of 28 x 28 pixels after resizing
    text = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>How many?<|im_end|>\n"
    images = [Image.new("RGB", size, "red") for size in sizes]
    batch = processor(text=[text] * 4, images=images, padding=True, padding_side=side, return_tensors="pt")
    assert (batch["input_ids"] == config.image_token_id).sum(1).tolist() == tokens
    pad_first = batch["attention_mask"][3, 0] == 0
    assert pad_first == (side == "left")
    with torch.no_grad():
        hidden = AutoModel.from_config(config)(**batch).last_hidden_state
        logits = AutoModelForImageTextToText.from_config(config)(**batch).logits
    assert hidden.shape == (*batch["input_ids"].shape, 128)
    assert logits.shape == (*batch["input_ids"].shape, 2048)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("module", [arithmetic, shapes])
def test_solutions_are_right(module):
    for seed in range(300):
        rng = Random(seed)
        problem = module.draw_problem(rng)
        solution = module.draw_solution(rng, problem)
        assert solution.count("\\boxed{") == 1
        assert f"\\boxed{{{problem.answer}}}" in solution
        assert_sums_are_right(solution)


def test_drills_are_right():
    for seed in range(100):
        question, answer = arithmetic.draw_drill(Random(seed))
        assert len(re.findall(r" = ", answer)) == question.count(",") + 1
        assert_sums_are_right(answer)


def assert_sums_are_right(text: str) -> None:
    for left, sign, right, result in re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", text):
        a, b, c = int(left), int(right), int(result)
        assert {"+": a + b, "-": a - b, "*": a * b, "/": a / (b or 1)}[sign] == c
        assert 0 <= c <= arithmetic.LARGEST


def test_story_follows_its_steps():
    for seed in range(100):
        problem = arithmetic.draw_problem(Random(seed))
        quantity = problem.start
        for step in problem.steps:
            assert step.before == quantity
            assert step.sentence in problem.prompt
            quantity = step.after
        assert problem.answer == str(quantity)
        assert problem.hint in problem.prompt
        assert problem.aside[1] in problem.prompt


def test_texts_are_loosely_as_long_as_asked_for(tokenizer):
    """The corpus obeys length constraints about as well as language models do: Length Score of "equal to" near 40."""
    scores = {constraint: [] for constraint in CONSTRAINTS}
    for seed in range(600):
        rng = Random(seed)
        problem = writing.draw_problem(rng, free=0)
        length = len(tokenizer(writing.draw_solution(rng, problem)).input_ids)
        scores[problem.constraint].append(length / problem.length - 1)
    equal = np.array(scores["equal to"])
    assert 30 < 100 * np.exp(np.where(equal < 0, 5, -2) * equal).mean() < 50
    assert np.mean(scores["at most"]) < np.mean(scores["equal to"]) < np.mean(scores["at least"])


def test_corpus_keeps_the_draft_nearest_to_its_target_length():
    asked = writing.WritingProblem("the sea", "equal to", 10)
    assert writing.distance(asked, "word " * 8) == pytest.approx(0.0)  # 0.8 words a token
    assert writing.distance(asked, "word " * 4) == writing.distance(asked, "word " * 16) == pytest.approx(np.log(2))
    assert writing.distance(writing.WritingProblem("the sea"), "word") == 0.0
    documents = [corpus.document("text", 0, index) for index in range(1500)]
    found = [(d, re.search(r"must be equal to (\d+) tokens", d.prompt)) for d in documents]
    far = [abs(np.log(len(d.completion.split()) / 0.8 / int(m[1]))) for d, m in found if m]
    assert len(far) > 100
    assert np.mean(far) < 0.2  # of one draft it is 0.3


def test_image_shows_the_things():
    things = (shapes.Thing("red", "square", "large", 0, 2), shapes.Thing("blue", "circle", "small", 1, 0))
    image = shapes.paint(shapes.ShapesProblem(3, things, "count"))
    assert image.size == (84, 84)
    assert image.getpixel((70, 14)) == shapes.COLORS["red"]
    assert image.getpixel((60, 4)) == shapes.COLORS["red"]
    assert image.getpixel((14, 42)) == shapes.COLORS["blue"]
    assert image.getpixel((4, 32)) == image.getpixel((42, 42)) == (255, 255, 255)


def test_digits_look_different():
    def paint(digit: int) -> bytes:
        return shapes.paint(shapes.ShapesProblem(3, (shapes.Thing("red", str(digit), "small", 0, 0),), "sum")).tobytes()

    assert len({paint(digit) for digit in range(10)}) == 10


@pytest.mark.parametrize(("form", "target", "answer"), [
    ("count", (), "3"), ("count", ("red",), "2"), ("count", ("triangle",), "0"), ("count", ("large",), "1"),
    ("more", ("red", "blue"), "red"), ("more", ("blue", "red"), "red"), ("more", ("green", "yellow"), "equal"),
])  # fmt: skip
def test_answers_about_shapes(form, target, answer):
    things = (
        shapes.Thing("red", "square", "large", 0, 0),
        shapes.Thing("red", "circle", "small", 0, 1),
        shapes.Thing("blue", "circle", "small", 2, 2),
    )
    assert shapes.ShapesProblem(3, things, form, target).answer == answer


def test_sum_of_digits():
    things = tuple(shapes.Thing("red", digit, "small", 0, i) for i, digit in enumerate("352"))
    assert shapes.ShapesProblem(3, things, "sum").answer == "10"


@pytest.mark.parametrize("name", prompt_sets.SETS)
def test_prompt_sets(name):
    both, train, test = (prompt_sets.prompt_set(name, split, 200) for split in (None, "train", "test"))
    assert [p.prompt_id for p in prompt_sets.prompt_set(name, None, 50)] == [p.prompt_id for p in both[:50]]
    assert {p.split for p in train} == {"train"}
    assert {p.split for p in test} == {"test"}
    assert [p.prompt_id for p in both if p.split == "train"] == [p.prompt_id for p in train][: len(both)][
        : sum(p.split == "train" for p in both)
    ]
    key = {(p.messages[0]["content"], *(image.tobytes() for image in p.images)) for p in [*train, *test]}
    assert len(key) == 400
    assert 0.02 < np.mean([p.split == "test" for p in both]) < 0.2
    assert all(len(p.images) == p.messages[0]["content"].count("<image>") for p in both)
    assert prompt_sets.prompt_set(name, None, 5, seed=1)[0].messages != both[0].messages


def test_prompt_set_errors():
    with pytest.raises(DataError, match="did you mean 'tiny-math'"):
        prompt_sets.prompt_set("tiny-maths")
    with pytest.raises(DataError, match="train or test"):
        prompt_sets.prompt_set("tiny-math", "val")


@pytest.mark.parametrize(("meta", "text", "tokens", "verdict"), [
    ({"answer": "7"}, "4 + 3 = 7. \\boxed{7}", 9, True),
    ({"answer": "7"}, "\\boxed{7} no, \\boxed{8}", 9, False),
    ({"answer": "7"}, "7", 2, False),
    ({"constraint": "equal to", "length": 100}, "x", 111, True),
    ({"constraint": "equal to", "length": 100}, "x", 112, False),
    ({"constraint": "at most", "length": 100}, "x", 101, True),
    ({"constraint": "at most", "length": 100}, "x", 102, False),
    ({"constraint": "at least", "length": 100}, "x", 101, True),
    ({"constraint": "at least", "length": 100}, "x", 100, False),
    ({}, "x", 5, None),
])  # fmt: skip
def test_checks(meta, text, tokens, verdict):
    assert prompt_sets.check(meta, text, tokens) is verdict


@pytest.mark.parametrize("kind", ["text", "vision"])
def test_corpus_leaves_the_test_prompts_out(kind):
    names = ("tiny-vqa",) if kind == "vision" else ("tiny-math", "tiny-write")
    held_out = {p.messages[0]["content"] for name in names for p in prompt_sets.prompt_set(name, "test", 300)}
    documents = [corpus.document(kind, 0, index) for index in range(2000)]
    if kind == "text":  # the same question about another image is another problem
        assert not held_out & {document.prompt for document in documents}
    assert documents[:3] == [corpus.document(kind, 0, index) for index in range(3)]
    assert documents[0] != corpus.document(kind, 1, 0)


def test_records(written, tokenizer):
    kind, file, records = written
    assert len(records) == 2400
    assert len({record["prompt_id"] for record in records}) == 600
    eos = tokenizer.eos_token_id
    for record in records:
        ids, limit = record["token_ids"], record["sampling"]["max_tokens"]
        stopped = record["finish_reason"] == "stop"
        assert tokenizer.decode(ids[:-1] if stopped else ids) == record["completion"]
        assert ids.count(eos) == stopped
        assert (ids[-1] == eos and len(ids) <= limit) if stopped else len(ids) == limit
        content = record["messages"][0]["content"]
        assert content.count("<image>") == len(record.get("images", [])) == (kind == "vision")
    for record in records[:40]:
        if record["finish_reason"] == "stop":
            assert tokenizer(record["completion"]).input_ids == record["token_ids"][:-1]
        for image in record.get("images", []):
            assert Image.open(file.parent / image).size in {(84, 84), (112, 112)}


def test_splits_are_disjoint_by_prompt(written):
    _kind, file, records = written
    prompts: dict[str, set] = {"train": set(), "test": set()}
    for record in records:
        images = tuple((file.parent / image).read_bytes() for image in record.get("images", []))
        prompts[record["split"]].add((record["messages"][0]["content"], images))
    assert not prompts["train"] & prompts["test"]
    assert 0.05 < len(prompts["test"]) / 600 < 0.15


def test_lengths_are_wide(written):
    _, _, records = written
    lengths = np.array([len(record["token_ids"]) for record in records])
    median, high = np.percentile(lengths, [50, 99])
    assert 3.5 < high / median < 6
    cut = np.mean([record["finish_reason"] == "length" for record in records])
    assert 0 < cut < 0.05
    # Answers to one prompt differ, and yet the prompt says something about them.
    groups = lengths.reshape(600, 4)
    assert 0.3 < groups.var(axis=1, ddof=1).mean() / lengths.var() < 0.95


@pytest.mark.parametrize("kind", ["text", "vision"])
def test_writing_is_deterministic_and_reused(kind, tmp_path):
    first = rollouts.write_rollouts(kind, tmp_path / "a", prompts=5, completions=2)
    again = rollouts.write_rollouts(kind, tmp_path / "b", prompts=5, completions=2)
    other = rollouts.write_rollouts(kind, tmp_path / "c", prompts=5, completions=2, seed=1)
    files = {file.relative_to(tmp_path / "a"): file.read_bytes() for file in (tmp_path / "a").rglob("*.*")}
    assert files == {file.relative_to(tmp_path / "b"): file.read_bytes() for file in (tmp_path / "b").rglob("*.*")}
    assert len(files) == (7 if kind == "vision" else 2)
    assert first.read_bytes() == again.read_bytes() != other.read_bytes()
    stamp = first.stat().st_mtime_ns
    assert rollouts.write_rollouts(kind, tmp_path / "a", prompts=5, completions=2).stat().st_mtime_ns == stamp
    (tmp_path / "a" / "settings.json").unlink()  # as after a run that was stopped
    assert rollouts.write_rollouts(kind, tmp_path / "a", prompts=5, completions=2).stat().st_mtime_ns > stamp
    assert first.read_bytes() == again.read_bytes()
    rollouts.write_rollouts(kind, tmp_path / "a", prompts=5, completions=2, seed=1)
    assert first.read_bytes() == other.read_bytes()


def test_unseen_topics_have_known_adjectives_and_are_not_of_the_corpus(tokenizer):
    topics = writing.unseen_topics(220)
    assert len(set(topics)) == 220
    rng = Random(0)
    assert not set(topics) & {writing.draw_problem(rng).topic for _ in range(20_000)}
    assert all(len(tokenizer.encode(f" {topic.split()[1]}")) == 1 for topic in topics)
    assert not set(writing.unseen_topics(30, seed=0)) & set(writing.unseen_topics(30, seed=1))


@pytest.mark.parametrize(("count", "seed", "message"), [
    (0, 0, "at least 1"), (5, -1, "at least 0"), (221, 0, "there are 220 unseen topics"), (74, 2, "222 are needed"),
])  # fmt: skip
def test_unseen_topics_run_out(count, seed, message):
    with pytest.raises(DataError, match=message):
        writing.unseen_topics(count, seed)
