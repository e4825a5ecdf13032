"""The playground in a real browser; skipped where playwright or Chromium is missing."""

import os
import re
import shutil

import pytest
from served import generator_of, serving

from lenvm_lightning.serving.service import Limits

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = os.environ.get("LENVM_CHROMIUM") or shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium ($LENVM_CHROMIUM names one elsewhere)")
QUIET = [
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *QUIET])
        yield found
        found.close()


@pytest.fixture
def page(browser):
    context = browser.new_context()
    found = context.new_page()
    found.errors = []
    found.asked = []
    found.on("pageerror", lambda error: found.errors.append(str(error)))
    found.on("request", lambda request: found.asked.append(request.url))
    yield found
    assert found.errors == []
    context.close()


def text_of(page, name):
    return page.locator(f"#text-{name}").inner_text()


def until_written(page):
    sync_api.expect(page.locator("#write")).to_be_enabled(timeout=60_000)


def test_base_and_guided_side_by_side(page, tiny_server):
    page.goto(tiny_server.url)
    sync_api.expect(page.locator("#model")).to_have_text("tiny-text")
    sync_api.expect(page.locator("#expected")).to_contain_text("tokens are expected")
    page.locator("#prompt").fill("Write a text about the river.")
    page.locator("#kind").select_option("at-most")
    page.locator("#amount").fill("30")
    sync_api.expect(page.locator("#told")).to_have_text("at most 30 tokens")
    page.locator("#write").click()
    sync_api.expect(page.locator("#count-guided")).to_have_text(re.compile(r"about \d+ to come"))
    until_written(page)
    count = page.locator("#count-guided").inner_text()
    assert count.endswith(" tokens")
    assert 0 < int(count.split()[0]) <= 30
    assert "river" in text_of(page, "guided")
    assert text_of(page, "base") != text_of(page, "guided")
    answer = tiny_server.client().chat.completions.create(
        model="tiny-text", messages=[{"role": "user", "content": "Write a text about the river."}], seed=0,
        extra_body={"lenvm": "at-most:30", "top_k": 15},
    )  # fmt: skip
    assert text_of(page, "guided") == answer.choices[0].message.content.strip()
    assert page.locator("#error").inner_text() == ""
    assert all(url.startswith((tiny_server.url, "data:")) for url in page.asked)


def test_stopped_it_writes_no_more(page):
    with serving(generator_of(rows=2), Limits(max_tokens=2000)) as server:
        page.goto(server.url)
        page.locator("#prompt").fill("Write a text about the sea. Use 500 tokens.")
        page.locator("#amount").fill("500")
        page.locator("#write").click()
        sync_api.expect(page.locator("#text-guided")).to_have_text(re.compile(r".{20}"))
        page.locator("#stop").click()
        until_written(page)
        sync_api.expect(page.locator("#count-guided")).to_have_text("stopped")
        server.wait_until_idle()
        assert page.locator("#error").inner_text() == ""


def test_what_the_server_refuses_is_told(page):
    with serving(generator_of(rows=2), key="secret") as server:
        page.goto(server.url)
        sync_api.expect(page.locator("#error")).to_contain_text("this server asks for a key")
        page.locator("summary").click()
        page.locator("#key").fill("secret")
        page.locator("#key").blur()
        sync_api.expect(page.locator("#model")).to_have_text("tiny-text")
        sync_api.expect(page.locator("#error")).to_have_text("")
        page.locator("#prompt").fill("x " * 5000)
        page.locator("#write").click()
        sync_api.expect(page.locator("#error")).to_contain_text("context window")


def test_without_a_length_value_model_only_the_base_model_writes(page):
    with serving(generator_of(rows=2, lenvm=False)) as server:
        page.goto(server.url)
        sync_api.expect(page.locator("#text-guided")).to_contain_text("There is no length value model here")
        page.locator("#write").click()
        until_written(page)
        assert page.locator("#count-base").inner_text().endswith(" tokens")


def test_a_narrow_screen_and_the_keyboard(page, tiny_server):
    page.set_viewport_size({"width": 360, "height": 740})
    page.goto(tiny_server.url)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    boxes = [page.locator(f"#text-{name}").bounding_box() for name in ("base", "guided")]
    assert boxes[1]["y"] > boxes[0]["y"] + boxes[0]["height"]  # below each other
    page.locator("#prompt").focus()
    reached = []
    for _ in range(5):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert reached == ["kind", "amount", "SUMMARY", "write", reached[-1]]
    if shots := os.environ.get("LENVM_SCREENSHOTS"):
        page.locator("#write").click()
        until_written(page)
        page.screenshot(path=f"{shots}/narrow.png", full_page=True)
        page.set_viewport_size({"width": 1000, "height": 800})
        page.screenshot(path=f"{shots}/wide.png")
        page.emulate_media(color_scheme="dark")
        page.screenshot(path=f"{shots}/dark.png")
