"""LIFEBench, token variant: prompts that wish for a length, and how well the wish was met.

Items are rows of the benchmark's own layout: ``id``, ``category``, ``lang`` (``en`` or ``cn``) and ``task``, a text in
which ``{word_count_type}`` and ``{word_count}`` stand for the wish, counted in words; here it is put in tokens. The
scores are those of Zhang et al., section on length control.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ...errors import DataError, nearest
from ...rollouts.generators.interface import Prompt
from ...tinyworld import writing

if TYPE_CHECKING:
    from ...rollouts.prompts.rows import SourceRows

LengthControl = Literal["equal to", "at most", "at least"]
CONTROLS: tuple[LengthControl, ...] = ("equal to", "at most", "at least")
LANGUAGES = ("en", "cn")
_TOO_SHORT, _TOO_LONG = 5.0, 2.0  # how fast the score falls with the deviation

_CONTROL, _LENGTH = "{word_count_type}", "{word_count}"  # marks in a task
_CHINESE: dict[LengthControl, str] = {"equal to": "等于", "at most": "至多有", "at least": "至少有"}
_SOFT = {"en": (f"must be {_CONTROL}", "should be approximately"), "cn": (f"必须{_CONTROL}", "应约为")}
_UNIT = {"en": re.compile(r"([ -])(?:word|token)(s?)\b"), "cn": re.compile(r"\s*(?:个?字(?!数)|token)")}
_SHOWN = 20  # problems in a message


def length_deviation(n: float, target: int) -> float:
    """Return LD = (n - target) / target for ``n`` tokens written.

    Raises:
        ValueError: the target is not positive.
    """
    if target < 1:
        raise ValueError(f"the target must be at least 1 token, got {target}")
    return (n - target) / target


def length_score(n: float, target: int, control: LengthControl) -> float:
    """Return LS in [0, 100]: 100 where the wish was met, else exp(5 LD) or exp(-2 LD) of it.

    Too few tokens count under "equal to" and "at least", too many under "equal to" and "at most".

    Args:
        n: tokens written.
        target: tokens wished for.
        control: the wish.

    Raises:
        ValueError: the target is not positive, or an unknown control.
    """
    if control not in CONTROLS:
        raise ValueError(f"control must be one of {', '.join(CONTROLS)}; got {control!r}")
    deviation = length_deviation(n, target)
    if deviation < 0 and control != "at most":
        return 100 * math.exp(_TOO_SHORT * deviation)
    if deviation > 0 and control != "at least":
        return 100 * math.exp(-_TOO_LONG * deviation)
    return 100.0


def build_prompt(item: dict[str, Any], control: LengthControl, length: int, soften: bool = False) -> str:
    """Return the task of an item with its wish filled in, in tokens.

    English: ``N words`` becomes ``N tokens``. Chinese: ``字数`` becomes ``token数`` and ``N字`` a bare number, or
    ``N token`` where nothing before it says what is counted. Only the wish is rewritten: words and numbers that the
    task speaks about stay.

    Args:
        item: ``lang`` and ``task`` are used.
        control: the wish.
        length: in tokens.
        soften: ask for about this length: "should be approximately" instead of "must be equal to", 应约为 instead of
            必须等于. The other controls have no softer wording, and stay.

    Raises:
        ValueError: an unknown control, a length below 1, or an item whose wish cannot be put in tokens; so no prompt
            comes out without its number, its control or its unit.
    """
    problems = _wrong_wishes([control], [length])
    problems = problems or _wrong_task(item, soften=soften and control == "equal to")
    if problems:
        raise ValueError("; ".join(problems))
    lang, task = item["lang"], _in_tokens(item["lang"], item["task"], length)
    if soften and control == "equal to":
        task = task.replace(*_SOFT[lang])
    return task.replace(_CONTROL, control if lang == "en" else _CHINESE[control]).replace(_LENGTH, str(length))


def _in_tokens(lang: str, task: str, length: int) -> str:
    """Put the unit of the wish in tokens."""
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
    """Why the wish of an item cannot be put in tokens; empty where it can."""
    lang, task = item.get("lang"), item.get("task")
    problems = []
    if lang not in LANGUAGES:
        problems.append(f"lang must be en or cn, found {lang!r}")
    if not isinstance(task, str):
        return [*problems, f"task must be a text, found {task!r}"]
    problems += [
        f"task must have {mark} once, to be filled in, found it {task.count(mark)} times"
        for mark in (_CONTROL, _LENGTH)
        if task.count(mark) != 1
    ]
    if problems:
        return problems
    before, after = task.split(_LENGTH)
    counted = lang == "cn" and re.search("字数|token数", _clause(before))
    if not _UNIT[str(lang)].match(after) and not counted:
        unit = "words" if lang == "en" else "字"
        problems.append(f"expected {unit!r} after {_LENGTH}, the unit of the wish, found {after[:20]!r}")
    phrase, _ = _SOFT[str(lang)]
    if soften and phrase not in task:
        problems.append(f"there is no {phrase!r} that could be softened")
    return problems


def _wrong_wishes(controls: Sequence[str], lengths: Sequence[int]) -> list[str]:
    problems = [
        f"control must be one of {', '.join(CONTROLS)}; got {control!r}"
        for control in controls
        if control not in CONTROLS
    ]
    return problems + [
        f"a length must be a whole number of at least 1 token, got {length!r}"
        for length in lengths
        if not isinstance(length, int) or length < 1
    ]


@dataclass(frozen=True)
class Question:
    """A prompt that wishes for a length.

    Attributes:
        prompt: its meta has the ``item`` (an id), the ``lang`` and the ``category``.
        control: the wish.
        target: the length wished for, in tokens.
    """

    prompt: Prompt
    control: LengthControl
    target: int


def questions(
    items: Iterable[dict[str, Any]],
    controls: Sequence[LengthControl] = CONTROLS,
    lengths: Sequence[int] = (32, 64, 128, 256, 512, 1024),
    soften: bool = False,
) -> list[Question]:
    """Ask every item with every control and length, item by item.

    Prompts are called like ``lifebench/en/12/equal-to/128``, and ``.../softened`` where the wording is softer.

    Args:
        items: of `load_items`, or of `tiny_items`.
        controls: wishes.
        lengths: in tokens.
        soften: see `build_prompt`.

    Raises:
        ValueError: a wish that is none, or one given twice.
        DataError: items that cannot be asked, or two with one id; all of them, at once.
    """
    problems = _wrong_wishes(controls, lengths)
    for name, given in (("control", controls), ("length", lengths)):
        problems += [f"{name} {value!r} is given twice" for value in dict.fromkeys(given) if given.count(value) > 1]
    if problems:
        raise ValueError("; ".join(problems))
    asked = list(items)
    _complain(
        "items", _broken([(f"item {item.get('lang')}/{item.get('id')}", item) for item in asked], soften, controls)
    )
    return [_question(item, control, length, soften) for item in asked for control in controls for length in lengths]


def _question(item: dict[str, Any], control: LengthControl, length: int, soften: bool) -> Question:
    text = build_prompt(item, control, length, soften)
    prompt_id = f"lifebench/{item['lang']}/{item['id']}/{control.replace(' ', '-')}/{length}"
    if soften and control == "equal to":
        prompt_id += "/softened"
    meta = {"item": item["id"], "lang": item["lang"], "category": item["category"]}
    return Question(Prompt(prompt_id, [{"role": "user", "content": text}], meta=meta), control, length)


# -- items ------------------------------------------------------------------------------------------------------------


def load_items(
    source: str | Path,
    *,
    languages: Sequence[str] = LANGUAGES,
    limit: int | None = None,
    split: str | None = None,
    name: str | None = None,
) -> list[dict[str, Any]]:
    """Read items, in the benchmark's own layout.

    Args:
        source: a JSONL file; or a data set by hub id (the benchmark's own is ``LIFEBench/LIFEBench``), folder or file.
        languages: those to take, of ``en`` and ``cn``.
        limit: how many at most, spread evenly over languages, categories and types: always the same ones.
        split: of a data set; may be left out where it has one only, since the small splits repeat items of the large.
        name: configuration of a data set.

    Returns:
        The items in the order of the source.

    Raises:
        DataError: the source is not there, or holds items that cannot be asked (all of them, at once), or none.
    """
    wrong = [lang for lang in languages if lang not in LANGUAGES]
    if wrong or not languages:
        raise DataError(f"languages must be some of en and cn (Chinese), got {list(languages)}")
    if limit is not None and limit < 1:
        raise DataError(f"limit must be at least 1, got {limit}")
    rows = _rows(str(source), split, name)
    problems: list[str] = []
    placed: list[tuple[str, dict[str, Any]]] = []
    for index, row in rows.scan(rows.columns, [], None):
        if isinstance(row, ValueError):
            problems.append(f"{rows.place(index)}: {row}")
        else:
            placed.append((rows.place(index), row))
    _complain(str(source), problems + _broken(placed))
    items = [item for _, item in placed if item["lang"] in languages]
    if not items:
        raise DataError(f"{source} has no items in {' or '.join(languages)} (looked at {len(rows)} rows).")
    return items if limit is None else _spread(items, limit)


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
            "task": writing.wording(topic, _CONTROL, _LENGTH),
        }
        for number, topic in enumerate(writing.unseen_topics(count, seed))
    ]


def _rows(source: str, split: str | None, name: str | None) -> "SourceRows":
    # The datasets library takes half a second to import, which those who only score need not wait for.
    from ...rollouts.prompts.rows import DatasetRows, JsonlRows, load_splits

    file = Path(source).expanduser()
    if file.suffix == ".jsonl":
        if not file.is_file():
            raise DataError(f"there is no file {source!r} (looked from {Path.cwd()}).")
        if split or name:
            raise DataError(
                f"{source} is a file of items, without splits and configurations: leave split and name out."
            )
        return JsonlRows(file)
    hint = "With a copy of its JSONL file, give the path of that."
    found = load_splits(source, name, hint)
    if split is None and len(found) > 1:
        raise DataError(f"{source} has the splits {', '.join(found)}: say which one to take.")
    chosen = split or next(iter(found))
    if chosen not in found:
        raise DataError(f"{source} has no split {chosen!r}{nearest(chosen, found)} (it has {', '.join(found)}).")
    return DatasetRows(found[chosen], f"split {chosen!r} of {source}", None)


def _broken(
    placed: Sequence[tuple[str, dict[str, Any]]], soften: bool = False, controls: Sequence[str] = CONTROLS
) -> list[str]:
    """What is wrong with items, each with its place."""
    problems = []
    first: dict[str, str] = {}
    for place, item in placed:
        wrong = _wrong_task(item, soften and "equal to" in controls)
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


def _complain(source: str, problems: list[str]) -> None:
    if problems:
        more = len(problems) - _SHOWN
        raise DataError(
            f"{len(problems):,} rows of {source} cannot be used:\n  "
            + "\n  ".join(problems[:_SHOWN])
            + (f"\n  … and {more:,} more" if more > 0 else "")
        )


def _spread(items: list[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """Every so many-th item of those sorted by kind: each kind keeps its share, rounded."""
    if limit >= len(items):
        return items
    kinds = sorted(range(len(items)), key=lambda i: (*(str(items[i].get(k)) for k in ("lang", "category", "type")), i))
    taken = sorted(kinds[(2 * i + 1) * len(items) // (2 * limit)] for i in range(limit))
    return [items[i] for i in taken]
