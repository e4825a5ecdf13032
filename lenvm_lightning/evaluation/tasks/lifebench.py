"""Task `lifebench`: how well a length constraint is met, token variant.

Protocol: Zhang et al., section on length control. Equal to, at most, at least N tokens; temperature 1, top-k 15,
top-p .999; mean Length Score and mean deviation for each N, then their mean over N. Beside them stand what the base
model thinks of the texts and their length, for a score of 100 by three tokens, or by gibberish, is no success.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ...errors import DataError
from ...rollouts.constraint import CONSTRAINTS, Constraint, length_deviation, length_score
from ...rollouts.generators.interface import GeneratedText, Prompt
from ...utils.settings import COUNT, setting
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
from ..samples import Sample, System, by_question, logprob_per_token, repetition
from ..settings import TRUTH, EvaluationSettings, list_of, one_of
from ..statistics import mean_and_error
from ..systems import constraint_systems
from ..task import DataSource, Findings, Measured, Questions, Task, digest
from .lifebench_prompts import Question, build_prompt, problems_of, questions, tiny_items

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["LifebenchTask", "build_prompt", "length_deviation", "length_score", "load_items"]

_HUB = "LIFEBench/LIFEBench"
_TINY_ITEMS = 20
_SAMPLING = {"temperature": 1.0, "top_k": 15, "top_p": 0.999, "min_p": 0.0}
_NEAR = 0.1  # share of N
_FEWEST_SO_LONG = 5  # texts of `base` of a length, to say what such texts are like
_COLUMNS = [
    Column("length_score", "LS", "up", ".1f"),
    Column("deviation", "LD", "down", ".1%"),
    Column("length_share", "length / N", None, ".2f"),
    Column("within_10_percent", "within 10%", "up", ".0%"),
    Column("tokens", "tokens", None, ".1f"),
    Column("logprob_per_token", "log p a token", "up", ".2f"),
    Column("logprob_of_base", "of base that long", None, ".2f"),
    Column("repetition", "repeated", "down", ".1%"),
    Column("truncated_share", "truncated", "down", ".1%"),
]
_NOTES = [
    "LS: Length Score, 100 where the constraint was met; LD: mean of abs(length - N) / N, its mark only under "
    "`equal to`. ± is the standard error with items as the unit.",
    "A score of 100 by a few tokens, or by text that the base model finds unlikely, is no success: look at length / N "
    "and log p.",
    "log p a token: what the base model gives the text before any control; beside it that of all texts of `base`, "
    f"whatever it was asked for, that are within 10% of N tokens, where there are {_FEWEST_SO_LONG} or more. "
    "repeated: share of the runs of four tokens that stood in the same text before.",
]


# -- the task ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LifebenchSettings:
    """What this task alone can be asked."""

    lengths: list[int] | None = setting(list_of(COUNT, "a list of lengths"), "target lengths, tokens", None)
    constraints: list[Constraint] | None = setting(
        list_of(one_of(*CONSTRAINTS), f"a list of {', '.join(CONSTRAINTS)}"), ", ".join(CONSTRAINTS), None
    )
    languages: list[str] | None = setting(LANGUAGE_LIST, ", ".join(LANGUAGES), None)
    soften: bool = setting(TRUTH, "ask guided systems for `approximately` N instead of `equal to` N", False)


class LifebenchTask(Task):
    """LIFEBench; see `Task`."""

    name = "lifebench"
    settings = LifebenchSettings
    research_systems = ("base", "paper")

    def __init__(self) -> None:
        both = {**_SAMPLING, "constraints": list(CONSTRAINTS)}
        systems, compared = ("base", "ours"), ("base", "ours", "paper")
        tiny = {"lengths": [16, 32, 64, 128, 256], "n": 2, "limit": _TINY_ITEMS}
        paper = {"lengths": [32, 64, 128, 256, 512, 1024], "n": 1}
        self.sources = (
            DataSource("tiny", _tiny_questions, {**both, **tiny}, systems, compared, tiny_world=True),
            DataSource("paper", _benchmark_questions, {**both, **paper}, systems, compared),
        )

    def systems(self, settings: EvaluationSettings, names: Sequence[str]) -> list[System]:
        """Return systems that are given the constraint of the prompt."""
        return constraint_systems(names)

    def default_max_tokens(self, settings: EvaluationSettings) -> int:
        """Return three times the longest target length."""
        return 3 * max(settings.own.lengths)

    def judge(self, meta: Mapping[str, Any], completion: GeneratedText) -> dict[str, Any]:
        """Return the constraint, its target, and how well it was met."""
        tokens, constraint, target = len(completion.token_ids), meta["constraint"], meta["target"]
        return {
            "constraint": constraint,
            "target": target,
            "item": meta["item"],
            "lang": meta["lang"],
            "score": length_score(tokens, target, constraint),
            "deviation": length_deviation(tokens, target),
        }

    def summarise(self, measured: Measured) -> Findings:
        """Return a table for each constraint, and the plot."""
        own: LifebenchSettings = measured.settings.own
        assert own.constraints is not None
        assert own.lengths is not None
        tables, curves = [], {}
        of_base = measured.samples.get("base", [])
        for constraint in own.constraints:
            rows = []
            for system in measured.systems:
                samples = [s for s in measured.samples[system.name] if s.found["constraint"] == constraint]
                lines = []
                for n in own.lengths:
                    of_length = [sample for sample in samples if sample.found["target"] == n]
                    if of_length:
                        so_long = [sample for sample in of_base if _is_near(sample.tokens, n)]
                        lines.append(_row(system.name, n, of_length, so_long))
                rows += lines + ([_mean(system.name, lines, samples)] if len(lines) > 1 else [])
                curves[f"{constraint}/{system.name}"] = {
                    "N": [int(line.label["N"]) for line in lines],
                    "length_score": [line.measures["length_score"].value for line in lines],
                    "tokens": [line.measures["tokens"].value for line in lines],
                }
            tables.append(Table(f"{constraint} N tokens", _COLUMNS, rows, _NOTES))
        figure = plot_constraints(curves, own.constraints, measured.notice)
        return Findings(tables, curves, {"constraints": figure})


# -- questions --------------------------------------------------------------------------------------------------------


def _tiny_questions(settings: EvaluationSettings) -> Questions:
    """Items of the tiny world.

    Raises:
        EvaluationError: another language than English.
    """
    require_english(settings.own.languages)
    return _questions(settings, tiny_items(settings.limit or _TINY_ITEMS, settings.seed), _TINY_ITEMS)


def _benchmark_questions(settings: EvaluationSettings) -> Questions:
    """Items of the benchmark, from the hub or a local copy."""
    place, options = place_of(settings.data or _HUB, settings.task)
    options["languages"] = settings.own.languages or LANGUAGES
    of = len(load_items(place, **options))
    return _questions(settings, load_items(place, limit=settings.limit, **options), of)


def _questions(settings: EvaluationSettings, items: list[dict[str, Any]], of: int) -> Questions:
    """Each item with each constraint and length.

    Args:
        settings: defaults filled in.
        items: those that are asked.
        of: how many there are.
    """
    own: LifebenchSettings = settings.own
    assert own.constraints is not None
    assert own.lengths is not None
    constraints = [constraint for constraint in CONSTRAINTS if constraint in own.constraints]
    asked = [_prompt(question) for question in questions(items, constraints, own.lengths)]
    softer = None
    if own.soften:
        softer = [_prompt(question) for question in questions(items, constraints, own.lengths, soften=True)]
    return Questions(
        asked,
        of * len(own.constraints) * len(own.lengths),
        {"digest": digest([prompt.messages for prompt in asked])},
        softer,
    )


def _prompt(question: Question) -> Prompt:
    """A question with what judging needs in its `meta`."""
    meta = {**question.prompt.meta, "constraint": question.constraint, "target": question.target}
    return Prompt(question.prompt.prompt_id, question.prompt.messages, meta=meta)


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
        source: a JSONL file; or a data set by hub id (the benchmark's own is `LIFEBench/LIFEBench`), folder or file.
        languages: those to take, of `en` and `cn`.
        limit: how many at most, spread evenly over languages, categories and types: always the same ones.
        split: of a data set; may be left out where it has one only, since the small splits repeat items of the large.
        name: configuration of a data set.

    Returns:
        The items in the order of the source.

    Raises:
        DataError: the source is not there, or holds items that cannot be asked (all of them, at once), or none.
    """
    require_languages(languages)
    if limit is not None and limit < 1:
        raise DataError(f"limit must be at least 1, got {limit}")
    placed, problems = read_rows(source, split, name)
    refuse(str(source), problems + problems_of(placed))
    items = [item for _, item in placed if item["lang"] in languages]
    if not items:
        raise DataError(f"{source} has no items in {' or '.join(languages)} (looked at {len(placed)} rows).")
    return spread(items, limit, lambda item: tuple(str(item.get(key)) for key in ("lang", "category", "type")))


# -- tables and plot --------------------------------------------------------------------------------------------------


_OF_SAMPLES: dict[str, Callable[[Sample], float]] = {
    "length_score": lambda s: s.found["score"],
    "deviation": lambda s: abs(s.found["deviation"]),
    "length_share": lambda s: s.tokens / s.found["target"],
    "within_10_percent": lambda s: float(_is_near(s.tokens, s.found["target"])),
    "tokens": lambda s: float(s.tokens),
    "repetition": lambda s: repetition(s.token_ids),
}


def _is_near(tokens: int, n: int) -> bool:
    return abs(tokens - n) <= _NEAR * n


def _row(system: str, n: int, samples: list[Sample], so_long: list[Sample]) -> TableRow:
    """A line of the table.

    Args:
        system: its name.
        n: target length, tokens.
        samples: its texts for that target.
        so_long: texts of `base` that happen to have about that length.
    """
    measures = {
        **{name: Measure(*mean_and_error(by_question(samples, value))) for name, value in _OF_SAMPLES.items()},
        "logprob_per_token": Measure(logprob_per_token(samples)),
        "logprob_of_base": Measure(logprob_per_token(so_long) if len(so_long) >= _FEWEST_SO_LONG else None),
        "truncated_share": Measure(mean_and_error(by_question(samples, lambda s: float(s.truncated)))[0]),
    }
    return TableRow({"system": system, "N": str(n)}, measures, len(samples), len({s.prompt_id for s in samples}))


def _mean_over_lengths(samples: list[Sample], value: Callable[[Sample], float]) -> float:
    """Of the samples of an item: lengths weigh equally, however many samples they have."""
    by_length: dict[int, list[float]] = {}
    for sample in samples:
        by_length.setdefault(sample.found["target"], []).append(value(sample))
    return fmean(map(fmean, by_length.values()))


def _mean(system: str, rows: list[TableRow], samples: list[Sample]) -> TableRow:
    """The mean over N; its standard error with items as the unit: those of the rows are of the same items."""
    of_items: dict[tuple[str, str], list[Sample]] = {}
    for sample in samples:
        of_items.setdefault((sample.found["lang"], str(sample.found["item"])), []).append(sample)
    measures = {}
    for name in rows[0].measures:
        values = [row.measures[name].value for row in rows]
        known = None not in values
        error = None
        if name in _OF_SAMPLES:
            means = {"/".join(item): [_mean_over_lengths(some, _OF_SAMPLES[name])] for item, some in of_items.items()}
            error = mean_and_error(means)[1]
        measures[name] = Measure(sum(v for v in values if v is not None) / len(rows) if known else None, error)
    return TableRow({"system": system, "N": "mean"}, measures, len(samples), len({s.prompt_id for s in samples}))


def plot_constraints(curves: Mapping[str, Any], constraints: Sequence[str], notice: str) -> "Figure":
    """Length Score against N, a panel for each constraint."""
    import numpy as np

    from ..plots import new_figure

    figure, axes = new_figure(len(constraints), 3.6)
    for constraint, axis in zip(constraints, np.ravel(axes), strict=True):
        for key, curve in curves.items():
            if key.startswith(f"{constraint}/"):
                axis.plot(curve["N"], curve["length_score"], marker="o", label=key.partition("/")[2])
        axis.set_xscale("log", base=2)
        lengths = sorted({n for key, curve in curves.items() if key.startswith(f"{constraint}/") for n in curve["N"]})
        axis.set_xticks(lengths, [str(n) for n in lengths])
        axis.minorticks_off()
        axis.set(title=f"{constraint} N{f' ({notice})' if notice else ''}", xlabel="N, tokens", ylim=(0, 103))
    np.ravel(axes)[0].set_ylabel("Length Score")
    np.ravel(axes)[0].legend(fontsize=7)
    return figure


TASKS = (LifebenchTask(),)
