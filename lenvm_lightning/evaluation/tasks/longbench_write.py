"""Task `longbench-write`: texts of a required length in words, from 100 to 20,000 of them.

LongBench-Write (Bai et al., LongWriter) has 120 prompts, English and Chinese, each with the length that it asks for.
Protocol: one completion a prompt, temperature 0.5, at most 32,768 tokens. Lengths are counted as the benchmark counts
them: a Chinese character is a word, and so is a run of Latin letters. The score is its length score S_l.

Controls count tokens. So the required words become target tokens with the tokens that `base` wrote for a word in the
language of the prompt, or with those that `--tokens-per-word` gives; the report says how many.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ...errors import DataError, EvaluationError
from ...rollouts.generators.interface import GeneratedText, Prompt
from ...utils.settings import OPTIONS, Kind, is_integer, is_number, setting
from .. import tiny_world
from ..benchmark_rows import (
    LANGUAGE_LIST,
    LANGUAGES,
    place_of,
    read_rows,
    refuse,
    require_english,
    require_languages,
    spread,
)
from ..results import Column, Measure, Table, TableRow
from ..samples import Sample, System, by_question, logprob_per_token
from ..settings import EvaluationSettings
from ..statistics import mean_and_error
from ..systems import constraint_systems
from ..task import DataSource, Findings, Measured, Questions, Task, digest
from .longbench_words import count_words, language_of, words_score

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BUCKETS = (0, 500, 2000, 4000)  # where the benchmark's ranges of required lengths begin; the last one has no end
_TINY_BUCKETS = (0, 50, 100, 200)  # tiny models write texts of a tenth of that
_TINY_LENGTHS = (20, 40, 80, 160)  # words
_TINY_PROMPTS = 12
_GUIDED_SAMPLING = {"top_k": 15, "top_p": 0.999}  # candidates that are scored: few, as in LIFEBench
_COLUMNS = [
    Column("length_score", "S_l", "up", ".1f"),
    Column("length_share", "words / required", None, ".2f"),
    Column("words", "words", None, ",.0f"),
    Column("tokens", "tokens", None, ",.0f"),
    Column("tokens_per_word", "tokens a word", None, ".2f"),
    Column("logprob_per_token", "log p a token", "up", ".2f"),
    Column("truncated_share", "truncated", "down", ".1%"),
]
_NOTES = [
    "S_l: 100 where as many words were written as required; 0 at four times as many, or a third. Words: Chinese "
    "characters plus runs of Latin letters. ± is the standard error with prompts as the unit.",
    "A high score by text that the base model finds unlikely is no success: look at log p.",
]


# -- scores -----------------------------------------------------------------------------------------------------------


def _are_tokens_per_word(value: Any) -> bool:
    if not isinstance(value, dict) or not value or set(value) - set(LANGUAGES):
        return False
    return all(is_number(tokens) and tokens > 0 for tokens in value.values())


_TOKENS_PER_WORD = Kind(OPTIONS.parse, _are_tokens_per_word, "positive numbers by language, such as {en: 1.5, cn: 1}")


@dataclass(frozen=True)
class LongbenchSettings:
    """What this task alone can be asked."""

    languages: list[str] | None = setting(LANGUAGE_LIST, ", ".join(LANGUAGES), None)
    tokens_per_word: dict[str, float] | None = setting(
        _TOKENS_PER_WORD, "turns required words into target tokens (default: as `base` writes)", None
    )


class LongbenchWriteTask(Task):
    """LongBench-Write; see `Task`."""

    name = "longbench-write"
    settings = LongbenchSettings
    research_systems = ("base", "paper")

    def __init__(self) -> None:
        sampling = {"temperature": 0.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        systems, compared = ("base", "ours"), ("base", "ours", "paper")
        fewer = {"n": 2, "limit": _TINY_PROMPTS, "max_tokens": 768}
        self.sources = (
            DataSource("tiny", _tiny_questions, {**sampling, **fewer}, systems, compared, tiny_world=True),
            DataSource("paper", _benchmark_questions, {**sampling, "n": 1, "max_tokens": 32_768}, systems, compared),
        )

    def systems(self, settings: EvaluationSettings, names: Sequence[str]) -> list[System]:
        """Return systems that are given the required length; `base` first, since its words are counted for the others.

        Raises:
            EvaluationError: a name that means nothing, or nobody says how many tokens a word has.
        """
        systems = constraint_systems(names, _GUIDED_SAMPLING)
        given = settings.own.tokens_per_word or {}
        missing = [language for language in settings.own.languages or LANGUAGES if language not in given]
        if any(system.guided for system in systems) and "base" not in names and missing:
            raise EvaluationError(
                f"controls count tokens, and the required lengths are words: measure `base` beside {', '.join(names)}, "
                f"whose tokens a word are taken, or give --tokens-per-word for {' and '.join(missing)}"
            )
        return sorted(systems, key=lambda system: system.name != "base")

    def prompts_for(
        self,
        system: System,
        settings: EvaluationSettings,
        questions: Questions,
        done: Mapping[str, list[Sample]],
    ) -> Sequence[Prompt]:
        """The questions; those of guided systems with their target in tokens.

        Raises:
            EvaluationError: `base` wrote no words in a language.
        """
        if not system.guided:
            return questions.prompts
        per_word: dict[str, float] = {}
        targeted = []
        for prompt in questions.prompts:
            lang = prompt.meta["lang"]
            if lang not in per_word:
                per_word[lang] = _tokens_per_word(lang, settings.own, done.get("base", []), done[system.name])
            target = max(1, round(prompt.meta["required"] * per_word[lang]))
            meta = {**prompt.meta, "target": target, "tokens_per_word": per_word[lang]}
            targeted.append(replace(prompt, meta=meta))
        return targeted

    def judge(self, meta: Mapping[str, Any], completion: GeneratedText) -> dict[str, Any]:
        """Return the words that were written, the words required, and the score; of guided systems the target too."""
        words, required = count_words(completion.text), meta["required"]
        found = {
            "required": required,
            "words": words,
            "score": words_score(words, required),
            "lang": meta["lang"],
            "type": meta["type"],
        }
        if "tokens_per_word" in meta:
            found |= {"target": meta["target"], "tokens_per_word": meta["tokens_per_word"]}
        return found

    def summarise(self, measured: Measured) -> Findings:
        """Return tables by required length and by language, and the plot."""
        buckets = _TINY_BUCKETS if measured.settings.data is None else BUCKETS
        by_length, by_language, curves = [], [], {}
        for system in measured.systems:
            samples = measured.samples[system.name]
            if not samples:
                continue
            for bucket in buckets:
                some = [sample for sample in samples if _bucket_of(sample.found["required"], buckets) == bucket]
                if some:
                    by_length.append(_row({"system": system.name, "required": _name_of(bucket, buckets)}, some))
            by_length.append(_row({"system": system.name, "required": "all"}, samples))
            for lang in LANGUAGES:
                some = [sample for sample in samples if sample.found["lang"] == lang]
                if some:
                    by_language.append(_row({"system": system.name, "language": lang}, some))
            curves[system.name] = {
                "required": [sample.found["required"] for sample in samples],
                "words": [sample.found["words"] for sample in samples],
            }
        notes = [*_NOTES, *_told_targets(measured)]
        tables = [
            Table("by required words", _COLUMNS, by_length, notes),
            Table("by language of the prompt", _COLUMNS, by_language),
        ]
        return Findings(tables, curves, {"required_and_written": plot_lengths(curves, measured.notice)})


def _tokens_per_word(lang: str, own: LongbenchSettings, base: list[Sample], before: list[Sample]) -> float:
    """Tokens that a required word of a language stands for.

    Args:
        lang: of the prompt.
        own: may give it.
        base: samples of the unguided generator.
        before: samples of the guided system from before it was stopped: what held for them holds on.

    Raises:
        EvaluationError: there are no words to count.
    """
    if own.tokens_per_word and lang in own.tokens_per_word:
        return float(own.tokens_per_word[lang])
    for sample in before:
        if sample.found["lang"] == lang:
            return float(sample.found["tokens_per_word"])
    written = [sample for sample in base if sample.found["lang"] == lang]
    words = sum(sample.found["words"] for sample in written)
    if not words:
        raise EvaluationError(
            f"`base` wrote no words for prompts in {lang}, so nobody knows how many tokens a word has: give "
            f"--tokens-per-word '{{{lang}: ...}}'"
        )
    return sum(sample.tokens for sample in written) / words


# -- questions --------------------------------------------------------------------------------------------------------


def _tiny_questions(settings: EvaluationSettings) -> Questions:
    """Texts of the tiny world, required in words, which its models have only ever been asked for in tokens.

    Raises:
        EvaluationError: another language than English.
    """
    require_english(settings.own.languages)
    count = settings.limit or _TINY_PROMPTS
    items = []
    for number, topic in enumerate(tiny_world.unseen_topics(count, settings.seed)):
        required = _TINY_LENGTHS[number % len(_TINY_LENGTHS)]
        text = tiny_world.writing_prompt(topic, "equal to", required).replace("tokens", "words")
        items.append({"id": f"tiny-{settings.seed}-{number}", "prompt": text, "type": "Tiny World", "length": required})
    return _questions(items, _TINY_PROMPTS)


def _benchmark_questions(settings: EvaluationSettings) -> Questions:
    """Prompts of the benchmark, from a local copy or a data set.

    Raises:
        EvaluationError: nobody says where they are.
    """
    if settings.data is None:
        raise EvaluationError(
            "--data is missing: longbench_write.jsonl, which is in the folder `evaluation` of the benchmark's "
            "repository (github.com/THUDM/LongWriter)"
        )
    place, options = place_of(settings.data, settings.task)
    items = load_items(place, settings.own.languages or LANGUAGES, **options)
    kept = spread(items, settings.limit, lambda item: (language_of(item["prompt"]), item["length"]))
    return _questions(kept, len(items))


def load_items(
    source: str, languages: Sequence[str] = LANGUAGES, split: str | None = None, name: str | None = None
) -> list[dict[str, Any]]:
    """Read prompts in the benchmark's own layout: `prompt`, `type`, and `length`, the words that it asks for.

    Args:
        source: a JSONL file; or a data set by hub id, folder or file.
        languages: those to take, of `en` and `cn`.
        split: of a data set.
        name: its configuration.

    Returns:
        The rows in their order; each with the number of its line as `id`, from 0, whatever languages are taken.

    Raises:
        DataError: the source is not there, or holds rows that cannot be used (all of them, at once), or none.
    """
    require_languages(languages)
    placed, problems = read_rows(source, split, name)
    for place, row in placed:
        wrong = _problems_of(row)
        if wrong:
            problems.append(f"{place}: {'; '.join(wrong)}")
    refuse(source, problems)
    items = [{**row, "id": str(number)} for number, (_, row) in enumerate(placed)]
    taken = [item for item in items if language_of(item["prompt"]) in languages]
    if not taken:
        raise DataError(f"{source} has no prompts in {' or '.join(languages)} (looked at {len(placed)} rows).")
    return taken


def _problems_of(row: dict[str, Any]) -> list[str]:
    """Why a row cannot be asked; empty where it can."""
    problems = []
    if not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        problems.append(f"prompt must be a text, found {row.get('prompt')!r}")
    if not is_integer(row.get("length")) or row["length"] < 1:
        problems.append(f"length must be a whole number of at least 1, found {row.get('length')!r}")
    if not isinstance(row.get("type"), str):
        problems.append(f"type must be a text, found {row.get('type')!r}")
    return problems


def _questions(items: list[dict[str, Any]], of: int) -> Questions:
    prompts = []
    for item in items:
        meta = {
            "required": item["length"],
            "lang": language_of(item["prompt"]),
            "type": item["type"],
            "constraint": "equal to",  # what the score measures, whatever the words of the prompt
            "target": item["length"],  # in words until `prompts_for` knows how many tokens they are
        }
        messages = [{"role": "user", "content": item["prompt"]}]
        prompts.append(Prompt(f"longbench-write/{item['id']}", messages, meta=meta))
    content = [[prompt.messages, prompt.meta["required"]] for prompt in prompts]
    return Questions(prompts, of, {"digest": digest(content)})


# -- tables and plot --------------------------------------------------------------------------------------------------


def _bucket_of(required: int, buckets: Sequence[int]) -> int:
    return max(start for start in buckets if start <= required)


def _name_of(bucket: int, buckets: Sequence[int]) -> str:
    place = list(buckets).index(bucket) + 1
    return f"[{bucket:,}, {buckets[place]:,})" if place < len(buckets) else f"{bucket:,} and more"


def _row(label: dict[str, str], samples: list[Sample]) -> TableRow:
    words = sum(sample.found["words"] for sample in samples)
    measures = {
        "length_score": Measure(*mean_and_error(by_question(samples, lambda s: s.found["score"]))),
        "length_share": Measure(
            *mean_and_error(by_question(samples, lambda s: s.found["words"] / s.found["required"]))
        ),
        "words": Measure(*mean_and_error(by_question(samples, lambda s: s.found["words"]))),
        "tokens": Measure(*mean_and_error(by_question(samples, lambda s: s.tokens))),
        "tokens_per_word": Measure(sum(sample.tokens for sample in samples) / words if words else None),
        "logprob_per_token": Measure(logprob_per_token(samples)),
        "truncated_share": Measure(mean_and_error(by_question(samples, lambda s: float(s.truncated)))[0]),
    }
    return TableRow(label, measures, len(samples), len({sample.prompt_id for sample in samples}))


def _told_targets(measured: Measured) -> list[str]:
    """How required words became target tokens; nothing where nobody was guided."""
    used: dict[str, set[float]] = {}
    for samples in measured.samples.values():
        for sample in samples:
            if "tokens_per_word" in sample.found:
                used.setdefault(sample.found["lang"], set()).add(sample.found["tokens_per_word"])
    if not used:
        return []
    given = measured.settings.own.tokens_per_word or {}
    parts = []
    for lang, ratios in sorted(used.items()):
        origin = "given" if lang in given else "as `base` wrote"
        parts.append(f"{' and '.join(f'{ratio:.3f}' for ratio in sorted(ratios))} for {lang} ({origin})")
    return [f"Targets of controls are the required words times the tokens a word: {', '.join(parts)}."]


def plot_lengths(curves: Mapping[str, Any], notice: str) -> "Figure":
    """Words written against words required, on logarithmic axes; a point a completion.

    Args:
        curves: `required` and `words` of each system.
        notice: of the title, such as `tiny world`.
    """
    from ..plots import new_figure

    figure, axis = new_figure()
    every = [1, 10]
    for name, curve in curves.items():
        written = [max(1, words) for words in curve["words"]]  # an empty text has a place at the edge
        axis.scatter(curve["required"], written, s=14, alpha=0.6, edgecolors="none", label=name)
        every += [*curve["required"], *written]
    low, high = min(every[2:], default=1) / math.sqrt(2), max(every) * math.sqrt(2)
    axis.plot([low, high], [low, high], color="0.6", linewidth=1, label="written = required")
    axis.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    title = "longbench-write" + (f" ({notice})" if notice else "")
    axis.set(title=title, xlabel="required, words", ylabel="written, words")
    axis.legend(fontsize=7)
    return figure


TASKS = (LongbenchWriteTask(),)
