"""A text as it is written under a control: what each token was chosen from, and the page that shows it."""

import html
import json
import os
import re
import shutil

import pytest

from lenvm_lightning.cli.main import main
from lenvm_lightning.decoding.generate import Completion, TokenTrace, generate
from lenvm_lightning.guidance import EqualTo
from lenvm_lightning.inspection.page import write_page
from lenvm_lightning.inspection.read import CandidateReading, Written, read_completions
from lenvm_lightning.inspection.traced import readings_of_traces
from lenvm_lightning.models.processors import load_processor
from lenvm_lightning.models.value_model import LengthValueModel
from lenvm_lightning.rollouts.generators.interface import Prompt
from lenvm_lightning.rollouts.generators.local import LocalGenerator
from lenvm_lightning.rollouts.prompting import encode_prompt

SEA = "Write a text about the sea."
PROMPT = Prompt("sea", [{"role": "user", "content": SEA}])
CHROMIUM = os.environ.get("LENVM_CHROMIUM") or shutil.which("chromium")


class Letters:
    """A tokenizer of one letter a token."""

    def decode(self, ids, **options):
        return "".join("abcdefgh"[token] for token in ids if token < 8)


def test_by_hand():
    steps = [
        TokenTrace(1, -0.5, 4.0, [0, 1], [0.75, 0.25], [9.0, 2.0], [0.5, 0.5]),
        TokenTrace(2, -0.3, 2.5, [2, 3, 4], [0.5, 0.3, 0.2], [1.5, 0.0, 7.0], [0.2, 0.7, 0.1]),
    ]
    [reading] = readings_of_traces(PROMPT, [Completion(0, 3, [1, 2], "length", trace=steps)], Letters(), 0.5)
    assert (reading.name, reading.expected, reading.truncated) == ("3", 4.0, True)
    first, second = reading.tokens
    assert (first.text, first.remaining, first.moved) == ("b", 2.5, 2.5 + 1 - 4.0)
    assert first.value == pytest.approx(-(1 - 0.5**2.5))
    assert second.remaining == 1.5  # what the chosen candidate promised: nothing was written after it
    assert first.candidates == [
        CandidateReading("b", 0.25, 2.0, 0.5, True),
        CandidateReading("a", 0.75, 9.0, 0.5, False),
    ]
    assert [(one.text, one.chosen) for one in second.candidates] == [("c", True), ("d", False), ("e", False)]
    # A stop text ends it where the model saw no end; a failed completion shows what was written until then.
    [stopped] = readings_of_traces(PROMPT, [Completion(0, 0, [1, 2], "stop", trace=steps)], Letters(), 0.5)
    assert stopped.tokens[-1].remaining == 1.5
    [failed] = readings_of_traces(PROMPT, [Completion(0, 0, [1], "error", trace=steps[:1])], Letters(), 0.5)
    assert (failed.name, len(failed.tokens)) == ("0 (failed)", 1)
    # An end token has no text.
    steps[-1] = TokenTrace(8, -0.3, 2.5, [8, 2], [0.5, 0.5], [0.0, 3.0], [1.0, 0.0])
    [ended] = readings_of_traces(PROMPT, [Completion(0, 0, [1, 8], "stop", trace=steps)], Letters(), 0.5)
    assert ended.tokens[-1].remaining == ended.tokens[-1].value == 0.0
    assert list(readings_of_traces(PROMPT, [Completion(0, 0, error="no")], Letters(), 0.5)) == []


def test_it_is_what_reading_the_text_again_says():
    generator, lenvm = LocalGenerator.load("tiny-text"), LengthValueModel.from_pretrained("tiny-text-lenvm")
    processor = load_processor("tiny-text")
    ids = encode_prompt(processor, PROMPT.messages, [])[0]
    [completion] = generate(generator.model, lenvm, [ids], control=EqualTo(40), trace=True)
    [written] = readings_of_traces(PROMPT, [completion], processor, lenvm.gamma)
    [read] = read_completions(lenvm, processor, [Written(PROMPT, completion.token_ids, "", "0")])
    assert written.expected == pytest.approx(read.expected, rel=1e-3)
    for one, other in zip(written.tokens, read.tokens, strict=True):
        assert (one.id, one.text) == (other.id, other.text)
        assert one.remaining == pytest.approx(other.remaining, rel=1e-3, abs=1e-2)
        assert one.value == pytest.approx(other.value, abs=1e-4)
    for token in written.tokens:
        assert [one.chosen for one in token.candidates].count(True) == bool(token.candidates)  # some have no rival
        assert sum(one.guided for one in token.candidates) <= 1 + 1e-6


@pytest.fixture
def page(tmp_path, capsys):
    assert main(["generate", "--equal-to", "40", "-n", "2", "--trace", str(tmp_path / "page.html"), SEA]) == 0
    assert "page.html: how each token was chosen" in capsys.readouterr().err
    return tmp_path / "page.html"


def test_the_page(page):
    content = page.read_text(encoding="utf-8")
    assert content.count("<article") == 2
    assert "tiny-text under EqualTo(n=40" in html.unescape(content)
    found = [json.loads(html.unescape(one)) for one in re.findall(r'data-candidates="([^"]*)"', content)]
    assert found
    for rows in found:
        assert [row[0] for row in rows] == ["→", *[""] * (len(rows) - 1)]
        assert all(len(row) == 5 for row in rows)


def test_candidates_are_text_and_not_code(tmp_path):
    step = TokenTrace(0, -0.5, 4.0, [0], [1.0], [3.0], [1.0])
    evil = "\"><script>alert(1)</script>'"

    class Evil:
        def decode(self, ids, **options):
            return evil

    readings = list(readings_of_traces(PROMPT, [Completion(0, 0, [0], "length", trace=[step])], Evil(), 0.5))
    write_page(readings, tmp_path / "page.html", "t")
    content = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert evil not in content
    assert content.count("<script>") == 1  # ours


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium ($LENVM_CHROMIUM names one elsewhere)")
def test_in_a_browser(page):
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        view = browser.new_page()
        view.goto(page.as_uri())
        view.locator(".text span[data-candidates]").nth(3).hover()
        rows = view.locator("#known tr")
        assert "candidate" in rows.first.inner_text()
        assert rows.nth(1).inner_text().startswith("→")
        view.locator(".text span").first.focus()
        view.keyboard.press("ArrowRight")
        assert view.locator("#known").inner_text().startswith("token 2:")
        browser.close()


def test_a_page_needs_a_length_value_model(tmp_path, capsys):
    generator = LocalGenerator.load("tiny-text")
    generator.model.save_pretrained(tmp_path / "model")
    generator.processor.save_pretrained(tmp_path / "model")
    words = ["generate", "--generator", str(tmp_path / "model"), "--trace", str(tmp_path / "page.html"), SEA]
    assert main(words) == 2
    assert "--lenvm is missing" in capsys.readouterr().err
