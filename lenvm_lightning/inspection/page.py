"""One HTML file that shows what a length value model thinks: nothing is fetched, and all text is escaped."""

import base64
import html
import io
import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from PIL import Image

from ..rollouts.record import IMAGE_MARK
from ..utils.images import open_image
from .read import CandidateReading, CompletionReading, TokenReading

_SHOWN_PIXELS = 480  # of an image, on its longer side
_WIDTH, _HEIGHT, _MARGIN = 640, 150, 34  # of the curve
_END, _NO_TEXT = "⏹", "◌"  # an end token, and others that stand for no text of their own
_STRONGEST = 0.3  # share of the tokens still to come that a token moves, for the strongest colour
_LEAST_SCALE = 8.0  # tokens: near the end a share says little


def write_page(readings: Sequence[CompletionReading], target: Path, title: str) -> None:
    """Write the page.

    Args:
        readings: completions of a prompt follow one another.
        target: the file.
        title: of the page, such as the names of the models.

    Raises:
        OSError: it cannot be written.
    """
    sections = [
        _section(number, list(some))
        for number, (_, some) in enumerate(groupby(readings, key=lambda reading: reading.prompt_id))
    ]
    head = html.escape(title)
    page = _PAGE.format(title=head, style=_STYLE, script=_SCRIPT, sections="\n".join(sections))
    target.write_text(page, encoding="utf-8")


def _section(number: int, readings: list[CompletionReading]) -> str:
    """A prompt and its completions."""
    first = readings[0]
    images = [f'<img alt="image {k}" src="{_embedded(image)}">' for k, image in enumerate(first.images, 1)]
    asked = "\n".join(
        f"<p><b>{html.escape(message['role'])}</b> {_prose(message['content'].replace(IMAGE_MARK, ''))}</p>"
        for message in first.prompt
    )
    completions = "\n".join(_completion(reading) for reading in readings)
    name = html.escape(first.prompt_id)
    return (
        f'<section aria-labelledby="p{number}"><h2 id="p{number}">{name}</h2>\n<div class="prompt">{asked}'
        f"{''.join(images)}</div>\n{completions}</section>"
    )


def _embedded(image: str) -> str:
    """An image as a ``data:`` address, small enough to be looked at."""
    opened = open_image(image)
    opened.thumbnail((_SHOWN_PIXELS, _SHOWN_PIXELS), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    opened.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _completion(reading: CompletionReading) -> str:
    length = len(reading.tokens)
    true = f"more than {length}" if reading.truncated else f"{length}"
    facts = f"{reading.expected:.0f} tokens expected, {true} written"
    ended = None if reading.truncated else length
    spans = "".join(_token(place, token, place == ended) for place, token in enumerate(reading.tokens, 1))
    return (
        f"<article><h3>{html.escape(reading.name)} <small>{facts}</small></h3>\n{_curve(reading)}\n"
        f'<div class="text" role="group" aria-label="tokens of {html.escape(reading.name)}">{spans}</div></article>'
    )


def _token(place: int, token: TokenReading, ends: bool) -> str:
    """A token, coloured by how much it moved the expected length; what is known of it shows when it is pointed at."""
    scale = max(token.remaining, _LEAST_SCALE) * _STRONGEST
    strength = min(abs(token.moved) / scale, 1.0)
    kind = "longer" if token.moved > 0 else "shorter"
    known = (
        f"token {place}: {token.moved:+.1f} tokens; {token.remaining:.1f} still to come, value {token.value:.3f}, "
        f"id {token.id}"
    )
    shown = _prose(token.text) if token.text else _END if ends else _NO_TEXT
    style = f'class="{kind}" style="--s:{strength:.2f}"'
    told = f'data-known="{html.escape(known)}"'
    if token.candidates:
        told += f' data-candidates="{html.escape(json.dumps([_row(one) for one in token.candidates]))}"'
    return f'<span tabindex="-1" {style} {told}>{shown}</span>'


def _row(candidate: CandidateReading) -> list[str]:
    """What a table tells of a candidate."""
    plain = candidate.text.strip() and candidate.text.isprintable()
    text = candidate.text if plain else repr(candidate.text)
    percent = (f"{probability:.1%}" for probability in (candidate.prob, candidate.guided))
    return ["→" if candidate.chosen else "", text, *percent, f"{candidate.remaining:.0f}"]


def _prose(text: str) -> str:
    return html.escape(text).replace("\n", "<br>")


def _curve(reading: CompletionReading) -> str:
    """Tokens still to come, as predicted and as it was, against tokens written."""
    predicted = [reading.expected, *(token.remaining for token in reading.tokens)]
    length = len(reading.tokens)
    most = max(*predicted, float(length), 1.0)

    def points(values: Sequence[float]) -> str:
        across = (_WIDTH - 2 * _MARGIN) / max(len(values) - 1, 1)
        return " ".join(
            f"{_MARGIN + across * k:.1f},{_HEIGHT - _MARGIN / 2 - (_HEIGHT - _MARGIN) * value / most:.1f}"
            for k, value in enumerate(values)
        )

    true = "" if reading.truncated else f'<polyline class="true" points="{points([float(length), 0.0])}"/>'
    told = f"predicted: {predicted[0]:.0f} tokens to come at first, {predicted[-1]:.0f} at the end"
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{told}">{true}'
        f'<polyline class="predicted" points="{points(predicted)}"/>'
        f'<text x="2" y="{_MARGIN / 2:.0f}">{most:.0f}</text>'
        f'<text x="2" y="{_HEIGHT - _MARGIN / 2:.0f}">0</text>'
        f'<text x="{_WIDTH - _MARGIN}" y="{_HEIGHT - 2}">{length}</text></svg>'
    )


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header><h1>{title}</h1>
<p>Each token is coloured by how many tokens it moved the expected length:
<span class="longer" style="--s:1">longer</span> or <span class="shorter" style="--s:1">shorter</span>.
Point at one, or go through a text with the arrow keys; where it is known, what a token was chosen from (the likeliest)
stands beside it. In the curves, the dashed line is what was still to
come.</p></header>
<main>{sections}</main>
<div id="known" role="status" aria-live="polite"></div>
<script>{script}</script>
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark; --longer: 220 80 40; --shorter: 40 110 220; }
body { font: 16px/1.6 system-ui, sans-serif; max-width: 52rem; margin: 0 auto; padding: 1rem 1rem 5rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1.05rem; overflow-wrap: anywhere; } h3 { font-size: 1rem; margin-bottom: 0; }
small { font-weight: normal; opacity: .75; margin-left: .5em; }
section { border-top: 1px solid #8886; margin-top: 2rem; }
.prompt { border-left: 3px solid #8888; padding-left: 1rem; } .prompt p { margin: .3rem 0; overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; }
svg { width: 100%; max-width: 40rem; display: block; } svg text { font-size: 11px; fill: currentColor; opacity: .7; }
polyline { fill: none; stroke-width: 1.5; } .predicted { stroke: rgb(var(--shorter)); }
.true { stroke: currentColor; stroke-dasharray: 4 4; opacity: .6; }
.text { overflow-wrap: anywhere; white-space: pre-wrap; }
.longer { background: rgb(var(--longer) / calc(var(--s) * .5)); }
.shorter { background: rgb(var(--shorter) / calc(var(--s) * .5)); }
.text span:hover, .text span:focus { outline: 2px solid currentColor; outline-offset: -1px; }
#known { position: fixed; left: 0; right: 0; bottom: 0; padding: .6rem 1rem; background: Canvas; min-height: 1.6em;
  border-top: 1px solid #8886; font-variant-numeric: tabular-nums; max-height: 45vh; overflow: auto; }
#known table { border-collapse: collapse; font-size: .85rem; line-height: 1.35; margin-top: .3rem; }
#known td, #known th { padding: 0 1.2em 0 0; text-align: right; font-weight: normal; white-space: pre; }
#known :is(td, th):nth-child(-n+2) { text-align: left; } #known th { opacity: .7; }
#known tr.chosen { font-weight: bold; }
"""

_SCRIPT = """
const known = document.getElementById("known");
const row = (cells, kind) => {
  const line = document.createElement("tr");
  for (const cell of cells) line.appendChild(document.createElement(kind)).textContent = cell;
  return line;
};
const show = token => {
  known.textContent = token ? token.dataset.known : "";
  if (!token || !token.dataset.candidates) return;
  const table = document.createElement("table");
  table.append(row(["", "candidate", "base model", "under the control", "tokens after it"], "th"));
  for (const cells of JSON.parse(token.dataset.candidates)) {
    const line = row(cells, "td");
    if (cells[0]) line.className = "chosen";
    table.append(line);
  }
  known.append(table);
};
for (const text of document.querySelectorAll(".text")) {
  if (text.firstElementChild) text.firstElementChild.tabIndex = 0;
  text.addEventListener("mouseover", event => show(event.target.closest("[data-known]")));
  text.addEventListener("mouseleave", () => show(null));
  text.addEventListener("focusin", event => show(event.target));
  text.addEventListener("keydown", event => {
    const at = event.target;
    const next = {ArrowRight: at.nextElementSibling, ArrowLeft: at.previousElementSibling,
      Home: text.firstElementChild, End: text.lastElementChild}[event.key];
    if (!next) return;
    event.preventDefault();
    at.tabIndex = -1; next.tabIndex = 0; next.focus();
  });
}
"""
