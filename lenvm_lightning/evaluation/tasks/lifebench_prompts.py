"""The wording of LIFEBench, token variant: items with their length constraint filled in, counted in tokens.

Items are rows of the benchmark's own layout: `id`, `category`, `lang` (`en` or `cn`) and `task`, a text in which
`{word_count_type}` and `{word_count}` stand for the constraint, counted in words; here it is put in tokens.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ...rollouts.constraint import CONSTRAINTS, Constraint
from ...rollouts.generators.interface import Prompt
from .. import tiny_world
from ..benchmark_rows import LANGUAGES, refuse

_CONSTRAINT, _LENGTH = "{word_count_type}", "{word_count}"  # marks in a task
_CHINESE: dict[Constraint, str] = {"equal to": "等于", "at most": "至多有", "at least": "至少有"}
_SOFT = {"en": (f"must be {_CONSTRAINT}", "should be approximately"), "cn": (f"必须{_CONSTRAINT}", "应约为")}
_UNIT = {"en": re.compile(r"([ -])(?:word|token)(s?)\b"), "cn": re.compile(r"\s*(?:个?字(?!数)|token)")}


def build_prompt(item: dict[str, Any], constraint: Constraint, length: int, soften: bool = False) -> str:
    """Return the task of an item with its length constraint filled in, in tokens.

    English: `N words` becomes `N tokens`. Chinese: `字数` becomes `token数` and `N字` a bare number, or
    `N token` where nothing before it says what is counted. Only the constraint is rewritten: words and numbers that
    the task speaks about stay.

    Args:
        item: `lang` and `task` are used.
        constraint: what is demanded.
        length: in tokens.
        soften: ask for about this length: "should be approximately" instead of "must be equal to", 应约为 instead of
            必须等于. The other constraints have no softer wording, and stay.

    Raises:
        ValueError: an unknown constraint, a length below 1, or an item whose constraint cannot be put in tokens; so no
            prompt comes out without its number, its constraint or its unit.
    """
    problems = _wrong_constraints([constraint], [length])
    problems = problems or _wrong_task(item, soften=soften and constraint == "equal to")
    if problems:
        raise ValueError("; ".join(problems))
    lang, task = item["lang"], _in_tokens(item["lang"], item["task"], length)
    if soften and constraint == "equal to":
        task = task.replace(*_SOFT[lang])
    return task.replace(_CONSTRAINT, constraint if lang == "en" else _CHINESE[constraint]).replace(_LENGTH, str(length))


def _in_tokens(lang: str, task: str, length: int) -> str:
    """Put the unit of the constraint in tokens."""
    before, after = task.split(_LENGTH)
    if lang == "en":
        # One token, and a "128-word essay", have no plural.
        return f"{before}{_LENGTH}" + _UNIT["en"].sub(
            lambda unit: f"{unit[1]}token{unit[2] if length > 1 else ''}", after, count=1
        )
    clause = _clause(before)
    text = before.removesuffix(clause)
    about, count, rest = clause.rpartition("字数")
    if count:
        clause = f"{about}token数{rest}"
    unit = "" if "token数" in clause else " token"
    written = _UNIT["cn"].match(after)
    return f"{text}{clause}{_LENGTH}{unit}{after[written.end() :] if written else after}"


def _clause(before: str) -> str:
    """What stands before a Chinese length in the same clause."""
    return re.split(r"[。！？；\n]", before)[-1]


def _wrong_task(item: dict[str, Any], soften: bool = False) -> list[str]:
    """Why the constraint of an item cannot be put in tokens; empty where it can."""
    lang, task = item.get("lang"), item.get("task")
    problems = []
    if lang not in LANGUAGES:
        problems.append(f"lang must be en or cn, found {lang!r}")
    if not isinstance(task, str):
        return [*problems, f"task must be a text, found {task!r}"]
    problems += [
        f"task must have {mark} once, to be filled in, found it {task.count(mark)} times"
        for mark in (_CONSTRAINT, _LENGTH)
        if task.count(mark) != 1
    ]
    if problems:
        return problems
    before, after = task.split(_LENGTH)
    counted = lang == "cn" and re.search("字数|token数", _clause(before))
    if not _UNIT[str(lang)].match(after) and not counted:
        unit = "words" if lang == "en" else "字"
        problems.append(f"expected {unit!r} after {_LENGTH}, the unit of the constraint, found {after[:20]!r}")
    phrase, _ = _SOFT[str(lang)]
    if soften and phrase not in task:
        problems.append(f"there is no {phrase!r} that could be softened")
    return problems


def _wrong_constraints(constraints: Sequence[str], lengths: Sequence[int]) -> list[str]:
    problems = [
        f"constraint must be one of {', '.join(CONSTRAINTS)}; got {constraint!r}"
        for constraint in constraints
        if constraint not in CONSTRAINTS
    ]
    return problems + [
        f"a length must be a whole number of at least 1 token, got {length!r}"
        for length in lengths
        if not isinstance(length, int) or length < 1
    ]


@dataclass(frozen=True)
class Question:
    """A prompt with a length constraint.

    Attributes:
        prompt: its meta has the `item` (an id), the `lang` and the `category`.
        constraint: what it demands.
        target: the target length, in tokens.
    """

    prompt: Prompt
    constraint: Constraint
    target: int


def questions(
    items: Iterable[dict[str, Any]],
    constraints: Sequence[Constraint] = CONSTRAINTS,
    lengths: Sequence[int] = (32, 64, 128, 256, 512, 1024),
    soften: bool = False,
) -> list[Question]:
    """Ask every item with every constraint and length, item by item.

    Prompts are called like `lifebench/en/12/equal-to/128`, and `.../softened` where the wording is softer.

    Args:
        items: of `load_items`, or of `tiny_items`.
        constraints: what is demanded.
        lengths: in tokens.
        soften: see `build_prompt`.

    Raises:
        ValueError: a constraint that is none, or one given twice.
        DataError: items that cannot be asked, or two with one id; all of them, at once.
    """
    problems = _wrong_constraints(constraints, lengths)
    for name, given in (("constraint", constraints), ("length", lengths)):
        problems += [f"{name} {value!r} is given twice" for value in dict.fromkeys(given) if given.count(value) > 1]
    if problems:
        raise ValueError("; ".join(problems))
    asked = list(items)
    placed = [(f"item {item.get('lang')}/{item.get('id')}", item) for item in asked]
    refuse("items", problems_of(placed, soften and "equal to" in constraints))
    return [
        _question(item, constraint, length, soften)
        for item in asked
        for constraint in constraints
        for length in lengths
    ]


def _question(item: dict[str, Any], constraint: Constraint, length: int, soften: bool) -> Question:
    text = build_prompt(item, constraint, length, soften)
    prompt_id = f"lifebench/{item['lang']}/{item['id']}/{constraint.replace(' ', '-')}/{length}"
    if soften and constraint == "equal to":
        prompt_id += "/softened"
    meta = {"item": item["id"], "lang": item["lang"], "category": item["category"]}
    return Question(Prompt(prompt_id, [{"role": "user", "content": text}], meta=meta), constraint, length)


def tiny_items(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Items of the tiny world in the benchmark's layout: texts on topics that no tiny model has seen.

    Args:
        count: how many.
        seed: another one has other topics.

    Raises:
        DataError: there are not so many topics.
    """
    return [
        {
            "id": f"tiny-{seed}-{number}",
            "category": "create",
            "type": "Tiny World",
            "lang": "en",
            "task": tiny_world.writing_prompt(topic, _CONSTRAINT, _LENGTH),
        }
        for number, topic in enumerate(tiny_world.unseen_topics(count, seed))
    ]


def problems_of(placed: Sequence[tuple[str, dict[str, Any]]], soften: bool = False) -> list[str]:
    """What is wrong with items, each with its place.

    Args:
        placed: items, each after its place for people.
        soften: their wording is to be softened.
    """
    problems = []
    first: dict[str, str] = {}
    for place, item in placed:
        wrong = _wrong_task(item, soften)
        number = item.get("id")
        if isinstance(number, bool) or not isinstance(number, int | str) or number == "":
            wrong.append(f"id must be a number or a text, found {number!r}")
        else:
            key = f"{item.get('lang')}/{number}"
            if key in first:
                wrong.append(f"the id {number!r} is that of {first[key]} too")
            first.setdefault(key, place)
        if not isinstance(item.get("category"), str):
            wrong.append(f"category must be a text, found {item.get('category')!r}")
        if wrong:
            problems.append(f"{place}: {'; '.join(wrong)}")
    return problems
