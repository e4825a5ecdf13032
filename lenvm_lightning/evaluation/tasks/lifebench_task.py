"""Task ``lifebench``: how well a wish for a length is met, token variant.

Protocol: Zhang et al., section on length control. Equal to, at most, at least N tokens; temperature 1, top-k 15,
top-p .999; mean Length Score and mean deviation for each N, then their mean over N. Beside them stand what the base
model thinks of the texts and their length, for a score of 100 by three tokens, or by gibberish, is no success.
"""

from collections.abc import Callable, Mapping
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ...errors import EvaluationError
from ...rollouts.generators.interface import GeneratedText, Prompt
from ..results import Column, Measure, Row, Table
from ..samples import Sample, System, by_question, logprob_per_token
from ..settings import EvaluationSettings
from ..statistics import mean_and_error
from ..systems import wish_systems
from ..task import Findings, Measured, Questions, digest
from .lifebench import CONTROLS, LANGUAGES, Question, length_deviation, length_score, load_items, questions, tiny_items

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HUB = "LIFEBench/LIFEBench"
_TINY_ITEMS = 20
_COLUMNS = [
    Column("length_score", "LS", "up", ".1f"),
    Column("deviation", "LD", "down", ".1%"),
    Column("length_share", "length / N", None, ".2f"),
    Column("tokens", "tokens", None, ".1f"),
    Column("logprob_per_token", "log p a token", "up", ".2f"),
    Column("cut_share", "cut", "down", ".1%"),
]
_NOTES = [
    "LS: Length Score, 100 where the wish was met; LD: mean of abs(length - N) / N, its mark only under `equal to`. "
    "± is the standard error with items as the unit.",
    "A score of 100 by a few tokens, or by text that the base model finds unlikely, is no success: look at length / N "
    "and log p.",
]


class WishTask:
    """LIFEBench; see `Task`."""

    version = 1
    needs_lenvm = False

    def defaults(self, tiny: bool) -> dict[str, Any]:
        """Return the paper's settings; in the tiny world shorter wishes."""
        drawing = {"temperature": 1.0, "top_k": 15, "top_p": 0.999, "min_p": 0.0, "wishes": list(CONTROLS)}
        if tiny:
            return {**drawing, "lengths": [16, 32, 64, 128, 256], "n": 2, "limit": _TINY_ITEMS}
        return {**drawing, "lengths": [32, 64, 128, 256, 512, 1024], "n": 1}

    def questions(self, settings: EvaluationSettings, tiny: bool) -> Questions:
        """Return each item with each wish and length."""
        assert settings.wishes is not None
        assert settings.lengths is not None
        if tiny:
            items, of = tiny_items(settings.limit or _TINY_ITEMS, settings.seed), _TINY_ITEMS
        else:
            given = settings.data if isinstance(settings.data, dict) else {"path": settings.data or _HUB}
            unknown = set(given) - {"path", "split", "name"}
            if unknown or "path" not in given:
                raise EvaluationError(f"--data: lifebench takes a path, and a split and a name of it; found {given}")
            options: dict[str, Any] = {key: value for key, value in given.items() if key != "path"}
            options["languages"] = settings.languages or LANGUAGES
            of = len(load_items(given["path"], **options))
            items = load_items(given["path"], limit=settings.limit, **options)
        wishes = [wish for wish in CONTROLS if wish in settings.wishes]
        asked = [
            [_prompt(question) for question in questions(items, wishes, settings.lengths, soften)]
            for soften in ([False, True] if settings.soften else [False])
        ]
        return Questions(
            asked[0],
            of * len(settings.wishes) * len(settings.lengths),
            {"digest": digest([prompt.messages for prompt in asked[0]])},
            asked[1] if settings.soften else None,
        )

    def systems(self, settings: EvaluationSettings, guided: bool, tiny: bool) -> list[System]:
        """Return the unguided generator, our controls and the paper's."""
        chosen = ["base", "ours", "paper"] if settings.compare else ["base", "ours"]
        if (settings.options or {}).get("server") == "research":  # it knows the paper's controls alone
            chosen = ["base", "paper"]
        return wish_systems(settings.systems or (chosen if guided else ["base"]))

    def judge(self, meta: Mapping[str, Any], completion: GeneratedText) -> dict[str, Any]:
        """Return the wish, its target, and how well it was met."""
        tokens, wish, target = len(completion.token_ids), meta["wish"], meta["target"]
        return {
            "wish": wish,
            "target": target,
            "item": meta["item"],
            "lang": meta["lang"],
            "score": length_score(tokens, target, wish),
            "deviation": length_deviation(tokens, target),
        }

    def summarise(self, measured: Measured) -> Findings:
        """Return a table for each wish, and the plot."""
        settings = measured.settings
        assert settings.wishes is not None
        assert settings.lengths is not None
        tables, curves = [], {}
        for wish in settings.wishes:
            rows = []
            for system in measured.systems:
                samples = [s for s in measured.samples[system.name] if s.found["wish"] == wish]
                lines = [
                    _row(system.name, str(n), found)
                    for n in settings.lengths
                    if (found := [sample for sample in samples if sample.found["target"] == n])
                ]
                rows += lines + ([_mean(system.name, lines, samples)] if len(lines) > 1 else [])
                curves[f"{wish}/{system.name}"] = {
                    "N": [int(line.label["N"]) for line in lines],
                    "length_score": [line.measures["length_score"].value for line in lines],
                    "tokens": [line.measures["tokens"].value for line in lines],
                }
            tables.append(Table(f"{wish} N tokens", _COLUMNS, rows, _NOTES))
        return Findings(tables, curves, {"wishes": plot_wishes(curves, settings.wishes, measured.notice)})


def _prompt(question: Question) -> Prompt:
    """A question with what judging needs in its ``meta``."""
    meta = {**question.prompt.meta, "wish": question.control, "target": question.target}
    return Prompt(question.prompt.prompt_id, question.prompt.messages, meta=meta)


_OF_SAMPLES: dict[str, Callable[[Sample], float]] = {
    "length_score": lambda s: s.found["score"],
    "deviation": lambda s: abs(s.found["deviation"]),
    "length_share": lambda s: s.tokens / s.found["target"],
    "tokens": lambda s: float(s.tokens),
}


def _row(system: str, length: str, samples: list[Sample]) -> Row:
    measures = {
        **{name: Measure(*mean_and_error(by_question(samples, value))) for name, value in _OF_SAMPLES.items()},
        "logprob_per_token": Measure(logprob_per_token(samples)),
        "cut_share": Measure(mean_and_error(by_question(samples, lambda s: float(s.cut)))[0]),
    }
    return Row({"system": system, "N": length}, measures, len(samples), len({s.prompt_id for s in samples}))


def _mean_over_lengths(samples: list[Sample], value: Callable[[Sample], float]) -> float:
    """Of the samples of an item: lengths weigh equally, however many samples they have."""
    by_length: dict[int, list[float]] = {}
    for sample in samples:
        by_length.setdefault(sample.found["target"], []).append(value(sample))
    return fmean(map(fmean, by_length.values()))


def _mean(system: str, rows: list[Row], samples: list[Sample]) -> Row:
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
    return Row({"system": system, "N": "mean"}, measures, len(samples), len({s.prompt_id for s in samples}))


def plot_wishes(curves: Mapping[str, Any], wishes: list[str], notice: str) -> "Figure":
    """Length Score against N, a panel for each wish."""
    import numpy as np

    from ..plots import new_figure

    figure, axes = new_figure(len(wishes), 3.6)
    for wish, axis in zip(wishes, np.ravel(axes), strict=True):
        for key, curve in curves.items():
            if key.startswith(f"{wish}/"):
                axis.plot(curve["N"], curve["length_score"], marker="o", label=key.partition("/")[2])
        axis.set_xscale("log", base=2)
        lengths = sorted({n for key, curve in curves.items() if key.startswith(f"{wish}/") for n in curve["N"]})
        axis.set_xticks(lengths, [str(n) for n in lengths])
        axis.minorticks_off()
        axis.set(title=f"{wish} N{f' ({notice})' if notice else ''}", xlabel="N, tokens", ylim=(0, 103))
    np.ravel(axes)[0].set_ylabel("Length Score")
    np.ravel(axes)[0].legend(fontsize=7)
    return figure
