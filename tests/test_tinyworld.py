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
from lenvm_lightning.tinyworld import arithmetic, build, rollouts, shapes
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
        shipped = {file.name: file.read_text(encoding="utf-8") for file in tinyworld.path(name).iterdir()}
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
        for left, sign, right, result in re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", solution):
            a, b, c = int(left), int(right), int(result)
            assert {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign] == c


def test_picture_shows_the_shapes():
    problem = shapes.Problem(3, (shapes.Shape("red", "square", 0, 2), shapes.Shape("blue", "circle", 1, 0)), "?", ())
    picture = shapes.paint(problem)
    assert picture.size == (84, 84)
    assert picture.getpixel((70, 14)) == shapes.COLORS["red"]
    assert picture.getpixel((14, 42)) == shapes.COLORS["blue"]
    assert picture.getpixel((42, 42)) == (255, 255, 255)


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
        pictures = tuple((file.parent / image).read_bytes() for image in record.get("images", []))
        prompts[record["split"]].add((record["messages"][0]["content"], pictures))
    assert not prompts["train"] & prompts["test"]
    assert 0.05 < len(prompts["test"]) / 600 < 0.15


def test_lengths_are_wide(written):
    _, _, records = written
    lengths = np.array([len(record["token_ids"]) for record in records])
    median, high = np.percentile(lengths, [50, 99])
    assert 3.5 < high / median < 5
    cut = np.mean([record["finish_reason"] == "length" for record in records])
    assert 0 < cut < 0.05
    # Answers to one prompt differ, and yet the prompt says something about them.
    groups = lengths.reshape(600, 4)
    assert 0.5 < groups.var(axis=1, ddof=1).mean() / lengths.var() < 0.95


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
