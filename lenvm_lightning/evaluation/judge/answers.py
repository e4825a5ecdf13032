r"""The judge of answers: what a response answers in the end, and whether that is right.

Two verdicts stand side by side: `right` asks whether the answer means the gold one (``\frac{1}{2}`` is ``0.5``),
`strict` whether it is the same string.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from string import ascii_uppercase
from typing import Literal

from ...utils.boxed import last_boxed
from .equality import MAX_LENGTH, clean, equal, number, same_text

Kind = Literal["integer", "float", "list", "text", "letter"]
_TAIL = 4000  # characters at the end of a response in which an answer without a box is looked for
_LETTER = r"(?:\\text\s*\{\s*)?[(\[]?\s*([A-Za-z])\s*[)\]]?(?:\s*\})?"


@dataclass(frozen=True)
class Verdict:
    """What was answered, and whether it is right.

    Attributes:
        answer: as `extract` finds it; None if there is none.
        right: it means the gold answer.
        strict: it is the gold answer, letter by letter.
    """

    answer: str | None
    right: bool
    strict: bool


def judge(
    text: str, gold: str, choices: Sequence[str] = (), precision: float | None = None, kind: Kind | None = None
) -> bool:
    """Return whether a response gives the right answer; never raises for what stands in it. See `verdict`."""
    return verdict(text, gold, choices, precision, kind).right


def judge_strict(text: str, gold: str, choices: Sequence[str] = ()) -> bool:
    """Return whether the answer of a response is the gold string; with choices, its letter or its text will do."""
    return _strict(extract(text), gold, choices)


def verdict(
    text: str, gold: str, choices: Sequence[str] = (), precision: float | None = None, kind: Kind | None = None
) -> Verdict:
    """Judge a response.

    Args:
        text: the whole response, thoughts and all.
        gold: the right answer, in plain text or LaTeX; with choices, the letter of one or its text.
        choices: their texts, A first. The response may give the letter, the text, or both.
        precision: decimals that count: the answer has to round to the gold rounded to so many. None or NaN: all.
        kind: what the gold is. `list`: items that are compared in order. `text`: compared as a string. `letter`: with
            choices, a gold letter stays one where it is also the text of another choice. `integer`, `float` and None:
            as it looks.

    Returns:
        Both verdicts; wrong if there is no answer or it cannot be read.
    """
    answer = extract(text)
    if answer is None:
        return Verdict(None, False, False)
    strict = _strict(answer, gold, choices)
    if len(answer) > MAX_LENGTH:  # no answer of this length is worth the time that reading it may take
        right = strict
    elif choices:
        right = _chosen(answer, gold, choices, kind == "letter")
    elif kind == "text":
        right = same_text(gold, answer)
    elif kind == "list" or _is_list(gold):
        right = _same_items(gold, answer, precision)
    else:
        right = equal(gold, answer, _places(precision))
    return Verdict(answer, right, strict)


def _places(precision: float | None) -> int | None:
    # MathVista gives 1.0, and a table that was read by pandas NaN for none.
    return None if precision is None or math.isnan(precision) else int(precision)


def _strict(answer: str | None, gold: str, choices: Sequence[str]) -> bool:
    if answer is None:
        return False
    golds = {gold.strip()}
    index = _choice(gold, choices, by_letter=False)
    if index is not None:
        golds |= {ascii_uppercase[index : index + 1], choices[index].strip()}
    return answer.strip() in golds


# Extraction.


def extract(text: str) -> str | None:
    r"""Return the final answer of a response, or None if there is none.

    Only what follows the last ``</think>`` counts, and nothing where a later ``<think>`` is not closed. There: the last
    ``\boxed{}``; else the last closing (``The answer is ...``, ``#### 18``, ``A: 18``, ``Answer: ...``); else the last
    formula, number or letter in parentheses of the last line that has one; else the response if it is a single line.
    """
    answer = text.rpartition("</think>")[2].strip()
    if not answer or "<think>" in answer:
        return None
    boxed = last_boxed(answer)
    if boxed is not None:
        return boxed
    tail = answer[-_TAIL:]
    return _closing(tail) or _last_mention(tail)


_CLOSING = re.compile(
    r"""(?:
      \#{3,}
    | ^\W{0,4}A\s*:
    | \b(?:answer|option|choice|solution)\b[*_]*[^.:=\n]{0,60}?\b(?:is|are|be|as)\b[*_]*\s*:?
    | \b(?:answer|option|choice)\b[*_]*\s*[:=]  # "Solution:" heads the steps to one
    )[*_]*\s*(?=[^\s:])""",
    re.VERBOSE | re.IGNORECASE | re.MULTILINE,
)
_SENTENCE_END = re.compile(
    r"\n|(?<=[^\s.])\.(?=\s|$)"
    r"|[,;]?\s+(?:because|since|so|as|which|where|and so|therefore|(?:and )?not)\s"
)


def _closing(text: str) -> str | None:
    """What follows the last "the answer is" or its like, to the end of the sentence."""
    for found in reversed(list(_CLOSING.finditer(text))):
        sentence = _SENTENCE_END.split(text[found.end() :], maxsplit=1)[0]
        answer = _bare(sentence.removeprefix("#### "))
        if answer:
            return _option(answer) or answer
    return None


def _option(answer: str) -> str | None:
    """The letter, of "(C), the square" or "option C"."""
    found = re.match(r"(?:(?:option|choice|answer)\s+)?[*_]*\(([A-Z])\)|(?:option|choice)\s+\(?([A-Z])\b", answer)
    return found[0] if found else None


def _bare(text: str) -> str:
    text = text.strip().strip("*_ \t").strip()
    return text[:-1].rstrip() if text.endswith((".", ",", ";")) else text


_MENTION = re.compile(
    r"""(?<!\\)\$(?P<a>[^$\n]+)(?<!\\)\$ | \\\((?P<b>.+?)\\\) | \\\[(?P<c>.+?)\\\]
    | (?P<list>\[[-\d.,\s]+\]) | (?P<letter>\([A-Z]\))
    | (?P<number>(?<![\w.])[-−]?\s?[$€£]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d))(?:/\d+)?(?:\s?%)?)""",
    re.VERBOSE,
)


_CUT_FORMULA = re.compile(r"\$[^$]*\\[a-zA-Z]+[^$]*\Z")


def _last_mention(text: str) -> str | None:
    if _CUT_FORMULA.search(text) and len(re.findall(r"(?<!\\)\$", text)) % 2:
        return None  # cut off within a formula; a lone $ without commands is money
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) == 1 and (number(lines[0]) or re.fullmatch(r"[-(\[\d\\]\S*(?:\s+\S+){0,2}", lines[0])):
        return _bare(lines[0])
    for line in reversed(lines):
        found = None
        for found in _MENTION.finditer(line):  # noqa: B007
            pass
        if found:
            formula = found["a"] or found["b"] or found["c"]
            return _bare(re.split(r"(?<![<>\\!])=", formula)[-1]) if formula else found[0].strip()
        only = re.search(r"(?:^|\s)([A-Z])[.\s*]*$", line)
        if only:
            return only[1]
    return _bare(lines[0]) if len(lines) == 1 else None


# Choices and lists.


def _chosen(answer: str, gold: str, choices: Sequence[str], by_letter: bool) -> bool:
    right = _choice(gold, choices, by_letter)
    if right is None:  # no choice at all, but an answer still
        return equal(gold, answer)
    return _choice(answer, choices, by_letter) == right


def _choice(answer: str, choices: Sequence[str], by_letter: bool) -> int | None:
    """Which choice an answer is, by letter, text or both; None if none.

    A bare letter that is the text of a choice is that choice unless `by_letter`.
    """
    if not choices:
        return None
    answer = clean(answer)
    answer = re.sub(r"^(?:the\s+)?(?:option|choice|answer)\s+", "", answer, flags=re.IGNORECASE)
    same = [i for i, choice in enumerate(choices) if same_text(choice, answer)]
    if same and not (by_letter and re.fullmatch(r"[A-Za-z]", answer)):
        return same[0]
    lettered = re.fullmatch(_LETTER + r"\s*(?:[.:)](?:\s.*)?|\s*)", answer, re.DOTALL) or re.match(
        r"(?:\\text\s*\{\s*)?[(\[]([A-Z])[)\]]", answer
    )
    if lettered and not re.search(r"[(\[][A-Z][)\]]|^\W*[A-Z]\W*$", answer[lettered.end(1) + 1 :]):  # not several
        index = ascii_uppercase.find(lettered[1].upper())
        if 0 <= index < len(choices):
            return index
    if same:
        return same[0]
    return next((i for i, choice in enumerate(choices) if equal(choice, answer)), None)


def _is_list(gold: str) -> bool:
    # Two items in brackets may be an interval.
    return bool(re.fullmatch(r"\[[^\[\]()]*,[^\[\]()]*,[^\[\]()]*\]", gold.strip()))


def _items(text: str) -> list[str]:
    """The items of a list, with brackets or without, split where no bracket is open."""
    text = re.sub(r"\s*,?\s+and\s+", ", ", clean(text))
    if re.fullmatch(r"[\[({].*[\])}]", text, re.DOTALL):
        text = text[1:-1]
    depth, cuts = 0, [-1]
    for place, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            cuts.append(place)
    return [text[a + 1 : b].strip().strip("'\"") for a, b in pairwise([*cuts, len(text)])]


def _same_items(gold: str, answer: str, precision: float | None) -> bool:
    golds, answers = _items(gold), _items(answer)
    places = _places(precision)
    return len(golds) == len(answers) and all(equal(g, a, places) for g, a in zip(golds, answers, strict=True))
