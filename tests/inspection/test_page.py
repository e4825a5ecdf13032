"""Readings of a text, and the page: the same numbers as everywhere, all text escaped, nothing fetched."""

import itertools
import json
import re
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from lenvm_lightning.cli.main import main
from lenvm_lightning.errors import DataError
from lenvm_lightning.inspection.page import write_page
from lenvm_lightning.inspection.read import CompletionReading, TokenReading, Written, completions_of, read_completions
from lenvm_lightning.models.processors import load_processor
from lenvm_lightning.models.value_model import LengthValueModel
from lenvm_lightning.rollouts.generators.interface import Prompt
from lenvm_lightning.rollouts.prompting import encode_prompt

PROMPT = Prompt("sea", [{"role": "user", "content": "Write a text about the sea."}])


def test_readings_are_what_the_model_says_at_each_token():
    lenvm, processor = LengthValueModel.from_pretrained("tiny-text-lenvm"), load_processor("tiny-text")
    text = "The sea is calm."
    ids = [*processor(text, add_special_tokens=False)["input_ids"], processor.eos_token_id]
    [reading] = read_completions(lenvm, processor, [Written(PROMPT, ids, text, "0")])
    asked = encode_prompt(processor, PROMPT.messages, [])[0]
    with torch.inference_mode():
        remaining = lenvm.remaining(lenvm(torch.tensor([asked + ids])))[0, len(asked) - 1 :].tolist()
    remaining[-1] = 0.0  # after the end, whatever the model says
    assert reading.expected == pytest.approx(remaining[0], rel=1e-4)
    assert [token.remaining for token in reading.tokens] == pytest.approx(remaining[1:], rel=1e-3, abs=1e-3)
    # What is expected of the whole text changes by so much with each token.
    whole = [done + left for done, left in enumerate(remaining)]
    moved = [after - before for before, after in itertools.pairwise(whole)]
    assert [token.moved for token in reading.tokens] == pytest.approx(moved, abs=0.01)
    assert reading.expected + sum(token.moved for token in reading.tokens) == pytest.approx(len(ids))
    assert "".join(token.text for token in reading.tokens) == text
    [encoded] = read_completions(lenvm, processor, [Written(PROMPT, None, text, "0", truncated=True)])
    assert [token.id for token in encoded.tokens] == ids[:-1]
    assert encoded.tokens[-1].remaining == pytest.approx(remaining[-2], rel=1e-3, abs=1e-3)  # a text need not end here


class Seen(HTMLParser):
    """Tags, addresses and text of a page."""

    def __init__(self):
        super().__init__()
        self.tags, self.addresses, self.text = [], [], ""

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "data", "action")]

    def handle_data(self, data):
        self.text += data


EVIL = "</span><script>alert(1)</script><img src=x onerror=alert(2)> & \"'"


def reading_of(prompt_id="p", text="word", images=(), truncated=False, content="question"):
    tokens = [
        TokenReading(5, text, -0.3, 20.0, 4.0),
        TokenReading(6, " b", -0.2, 10.0, -9.0),
        TokenReading(2, "", 0.0, 0.0, -9.0),
    ]
    return CompletionReading(
        prompt_id, [{"role": "user", "content": content}], list(images), "0", 33.0, tokens, truncated
    )


def test_the_page_holds_text_of_strangers_as_text(tmp_path):
    plain, evil = tmp_path / "plain.html", tmp_path / "evil.html"
    write_page([reading_of()], plain, "title")
    write_page([reading_of(EVIL, EVIL, content=EVIL)], evil, EVIL)
    pages = []
    for file in (plain, evil):
        pages.append(Seen())
        pages[-1].feed(file.read_text(encoding="utf-8"))
    assert pages[0].tags == pages[1].tags
    assert pages[1].text.count("alert(1)") == 5  # title twice, id, question, token
    for page in pages:
        assert page.addresses == []


def test_the_page_shows_completions_of_a_prompt_below_each_other_and_its_images(tmp_path):
    image = tmp_path / "red.png"
    Image.new("RGB", (900, 300), "red").save(image)
    write_page(
        [reading_of("a", images=[str(image)]), reading_of("a", truncated=True), reading_of("b")],
        tmp_path / "p.html",
        "t",
    )
    content = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert (content.count("<section"), content.count("<article")) == (2, 3)
    assert content.count('src="data:image/png;base64,') == 1
    assert "33 tokens expected, 3 written" in content
    assert "more than 3 written" in content
    assert content.count('class="true"') == 2  # nobody knows where the truncated one would have ended
    assert "default-src 'none'" in content
    strengths = [float(found) for found in re.findall(r"--s:([\d.]+)\" data-known", content)]
    assert strengths[:2] == [pytest.approx(4 / 6, abs=0.01), 1.0]
    assert not re.search(r"https?://", content)


def test_rollouts_are_shown_as_they_stand_in_the_file(tmp_path, capsys):
    words = "sample --generator tiny-text --prompts tiny-math --limit 2 -n 2 --max-tokens 60 --out"
    assert main([*words.split(), str(tmp_path / "rollouts")]) == 0
    capsys.readouterr()
    for source in (tmp_path / "rollouts", tmp_path / "rollouts" / "rollouts.jsonl"):
        assert main(["inspect", str(source), "--limit", "3"]) == 0
        readings = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [reading["name"] for reading in readings] == ["0", "1", "0"]
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    assert [[token["id"] for token in reading["tokens"]] for reading in readings] == [
        row["token_ids"] for row in rows[:3]
    ]
    assert [reading["truncated"] for reading in readings] == [row["finish_reason"] == "length" for row in rows[:3]]
    assert main(["inspect", str(source), "--out", str(tmp_path / "page.html")]) == 0
    assert "page.html: 4 completions" in capsys.readouterr().err
    assert "read by tiny-text-lenvm" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_text(capsys):
    assert main(["inspect", "The sea is calm.", "--prompt", "Write a text about the sea."]) == 0
    [reading] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert "".join(token["text"] for token in reading["tokens"]) == "The sea is calm."


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["A text"], "--prompt is missing: what does this text answer?"),
        (["A text", "--prompt", "p", "--out", "page.txt"], "--out: page.txt must end in .html"),
        (["A text", "--prompt", "p", "--out", "nowhere/page.html"], "--out: there is no folder"),
        (["x" * 5000], "--prompt is missing"),
        (["a.jsonl"], "a.jsonl, line 1: it cannot be read as rollouts"),
        (["empty.jsonl"], "empty.jsonl holds no completions"),
        (["a.jsonl", "--prompt", "p"], "--prompt: a.jsonl holds the prompts"),
    ],
)
def test_what_is_wrong_is_said(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text("{}\n", encoding="utf-8")
    (tmp_path / "empty.jsonl").write_text("", encoding="utf-8")
    assert main(["inspect", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_prompt_that_cannot_be_read_is_named():
    lenvm, processor = LengthValueModel.from_pretrained("tiny-text-lenvm"), load_processor("tiny-text")
    wrong = Written(PROMPT, [10**6], "", "0")
    with pytest.raises(DataError, match="'sea' cannot be read: token id 1000000"):
        list(read_completions(lenvm, processor, [wrong]))


def test_images_are_read_from_the_rollouts_folder(tmp_path):
    image = tmp_path / "red.png"
    Image.new("RGB", (56, 56), "red").save(image)
    record = {"prompt_id": "i", "messages": [{"role": "user", "content": "<image>What?"}], "images": ["red.png"],
              "completion": "Red.", "token_ids": [5, 6], "finish_reason": "stop"}  # fmt: skip
    file = tmp_path / "rollouts.jsonl"
    file.write_text(json.dumps(record) + "\n", encoding="utf-8")
    [written] = completions_of(file)
    assert written.prompt.images == (str(image),)
    assert main(["inspect", str(file), "--out", str(tmp_path / "page.html")]) == 0
    assert "data:image/png" in (tmp_path / "page.html").read_text(encoding="utf-8")
