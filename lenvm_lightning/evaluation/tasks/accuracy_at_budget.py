"""Tasks `gsm8k`, `math500`, `vqa`: what being right costs in tokens, beside a hard budget on the same samples.

Protocol: Zhang et al., section on the trade-off. 64 samples a question, temperature 1, min-p .01 for guided systems.
The hard budget is what truncation at B tokens would make of the very samples of `base`: wrong if longer, length
min(L, B), for every B. Tokens are generated ids, the end counted, on both sides.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import EvaluationError
from ...rollouts.generators.interface import GeneratedText
from ..results import Column, Measure, Table, TableRow
from ..samples import Sample, System, by_question, logprob_per_token
from ..settings import EvaluationSettings
from ..statistics import Completions, Frontier, at_length, gap_at_equal_length, hard_budget, mean_and_error
from ..systems import budget_systems
from ..task import DataSource, Findings, Measured, Questions, Task, first_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TINY_QUESTIONS = 50
_SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
_BETAS = (-20, -50, -100, -1000)  # the paper's strengths of the tilt
_TINY_BETAS = (-2, -5, -10, -20)  # what matters where completions have a tenth of its lengths
_COLUMNS = [
    Column("pass_at_1", "Pass@1", "up", ".3f"),
    Column("pass_at_1_strict", "strict", "up", ".3f"),
    Column("tokens", "tokens", "down", ".1f"),
    Column("tokens_share", "of base", "down", ".2f"),
    Column("budget_pass_at_1", "hard budget there", None, ".3f"),
    Column("gain", "gain", "up", "+.3f"),
    Column("truncated_share", "truncated", "down", ".1%"),
    Column("logprob_per_token", "log p a token", "up", ".2f"),
]
_NOTES = [
    "Pass@1: equal by mathematics; strict: the same string. ± is the standard error with questions as the unit.",
    "hard budget there: Pass@1 of `base` truncated at the budget that has this mean length; gain: Pass@1 less that, "
    "with its 95% interval (questions drawn again, 1,000 times).",
]


class BudgetTask(Task):
    """Problems with an answer; see `Task`.

    Args:
        name: of the task.
        tiny: name of its prompt set in the tiny world.
        sources: names of its data sets, the first where none is named.
        generator: the embedded generator that is measured where none is named.
    """

    def __init__(self, name: str, tiny: str, *sources: str, generator: str = "tiny-text") -> None:
        self.name, self.generator = name, generator
        self._tiny, self._sources = tiny, sources
        fewer = {"n": 8, "limit": _TINY_QUESTIONS, "max_tokens": 768}
        self.sources = (
            DataSource(
                "tiny",
                self._tiny_questions,
                {**_SAMPLING, **fewer},
                systems=("base", "tilt:-5"),
                compared=("base", "base+min-p", *(f"tilt:{beta}" for beta in _TINY_BETAS)),
                also=(tiny,),
                tiny_world=True,
            ),
            DataSource(
                "paper",
                self._benchmark_questions,
                {**_SAMPLING, "n": 64, "max_tokens": 4096},
                systems=("base", "tilt:-20"),
                compared=("base", "base+min-p", *(f"tilt:{beta}" for beta in _BETAS)),
            ),
        )

    def _tiny_questions(self, settings: EvaluationSettings) -> Questions:
        """Problems of the tiny world that no tiny model has seen, with their answers in `meta`."""
        from ...rollouts.prompts import load_prompts

        limit = settings.limit or _TINY_QUESTIONS
        prompts = load_prompts({"source": self._tiny, "seed": 1}, split="test", limit=limit)
        return Questions(prompts, _TINY_QUESTIONS, prompts.description)

    def _benchmark_questions(self, settings: EvaluationSettings) -> Questions:
        """Problems of the benchmark, from the hub or a local copy, with their answers in `meta`."""
        from ...rollouts.prompts import load_prompts

        source = self._source(settings.data)
        prompts = load_prompts(
            source,
            split=source.pop("split", None if settings.data_is_file else "test"),
            allow_images_from=settings.allow_images_from,
        )
        return Questions(first_of(prompts, settings.limit), len(prompts), prompts.description)

    def _source(self, data: str | dict[str, Any] | None) -> dict[str, Any]:
        """A source for `load_prompts`.

        Raises:
            EvaluationError: data of another task.
        """
        if isinstance(data, dict):
            if data.get("source") not in self._sources:
                raise EvaluationError(f"--data: source must be one of {', '.join(self._sources)}, found {data}")
            return dict(data)
        if data is None or data in self._sources:
            return {"source": data or self._sources[0]}
        name = self._sources[0]
        if len(self._sources) > 1 and data.endswith(".jsonl") and Path(data).is_file():
            with open(data, "rb") as file:  # what is broken in it is told by those who read all of it
                columns = file.readline()
            name = "mathvista" if b'"answer_type"' in columns or b'"choices"' in columns else "mathvision"
        elif len(self._sources) > 1:
            name = next((known for known in self._sources if known in data.lower().replace("-", "")), name)
        return {"source": name, "path": data}

    def systems(self, settings: EvaluationSettings, names: Sequence[str]) -> list[System]:
        """Return the unguided generator and controls that are the same for all questions."""
        return budget_systems(names)

    def judge(self, meta: Mapping[str, Any], completion: GeneratedText) -> dict[str, Any]:
        """Return both verdicts, and the answer that was found.

        Raises:
            EvaluationError: a question without an answer, which nobody could get right.
        """
        gold = str(meta.get("answer", "")).strip()
        if not gold:
            raise EvaluationError(
                "a question has no answer to judge by, as in splits whose answers are kept secret: take another split, "
                "such as --data '{source: mathvista, split: testmini}'"
            )
        from ..judge.answers import verdict  # math-verify takes a while to import

        choices = meta.get("choices") or meta.get("options") or ()
        kind: Any = "letter" if meta.get("options") else "list" if meta.get("answer_type") == "list" else None
        found = verdict(completion.text, gold, choices, _precision(meta), kind)
        return {"right": found.right, "strict": found.strict, "answer": found.answer}

    def summarise(self, measured: Measured) -> Findings:
        """Return the table, the frontier of the hard budget, and the plot."""
        base = measured.samples.get("base")
        truncated = hard_budget(**vars(_completions(base))) if base else None
        rows, points = [], {}
        for system in measured.systems:
            samples = measured.samples[system.name]
            if samples:
                row = _row(system, samples, base, truncated)
                tokens, passed = row.measures["tokens"], row.measures["pass_at_1"]
                rows.append(row)
                points[system.name] = {"tokens": tokens.value, "pass_at_1": passed.value, "error": passed.error}
        curves: dict[str, Any] = {"points": points}
        notes = list(_NOTES)
        if truncated is not None:
            curves["hard_budget"] = {"tokens": truncated.lengths.tolist(), "pass_at_1": truncated.passes.tolist()}
        else:
            notes[1] = "No hard budget: it is computed from samples of the system `base`, which was not measured."
        differ = sum(s.found["right"] != s.found["strict"] for samples in measured.samples.values() for s in samples)
        notes.append(f"In {differ:,} samples the two verdicts differ; both are in samples.jsonl.")
        figure = plot_frontier(curves, f"{self.name} ({measured.notice})" if measured.notice else self.name)
        return Findings([Table("Pass@1 against tokens", _COLUMNS, rows, notes)], curves, {"frontier": figure})


def _precision(meta: Mapping[str, Any]) -> int | None:
    """Decimals of a float of MathVista."""
    given = meta.get("precision")
    return int(float(given)) if given not in (None, "") and meta.get("answer_type", "float") == "float" else None


def _completions(samples: list[Sample]) -> Completions:
    """Tokens, verdicts and questions of samples."""
    return Completions(
        np.array([sample.tokens for sample in samples]),
        np.array([sample.found["right"] for sample in samples]),
        np.array([sample.prompt_id for sample in samples]),
    )


def _row(system: System, samples: list[Sample], base: list[Sample] | None, frontier: Frontier | None) -> TableRow:
    measures = {
        "pass_at_1": Measure(*mean_and_error(by_question(samples, lambda s: float(s.found["right"])))),
        "pass_at_1_strict": Measure(*mean_and_error(by_question(samples, lambda s: float(s.found["strict"])))),
        "tokens": Measure(*mean_and_error(by_question(samples, lambda s: s.tokens))),
        "truncated_share": Measure(mean_and_error(by_question(samples, lambda s: float(s.truncated)))[0]),
        "logprob_per_token": Measure(logprob_per_token(samples)),
    }
    if base and frontier is not None and system.name != "base":
        tokens = measures["tokens"].value
        assert tokens is not None
        measures["tokens_share"] = Measure(tokens / float(frontier.lengths[-1]))
        measures["budget_pass_at_1"] = Measure(at_length(frontier, tokens))
        if system.guided:
            # Where completions could not be had, of the questions that both have answered.
            both = {sample.prompt_id for sample in base} & {sample.prompt_id for sample in samples}
            if both:
                ours, others = [[s for s in some if s.prompt_id in both] for some in (samples, base)]
                gap = gap_at_equal_length(_completions(others), _completions(ours))
                measures["gain"] = Measure(gap.gap, low=gap.low, high=gap.high)
    return TableRow({"system": system.name}, measures, len(samples), len({sample.prompt_id for sample in samples}))


def plot_frontier(curves: Mapping[str, Any], title: str) -> "Figure":
    """Pass@1 against mean tokens: the hard budget as a line, the systems as points."""
    from ..plots import new_figure

    figure, axis = new_figure()
    if "hard_budget" in curves:
        axis.plot(
            curves["hard_budget"]["tokens"], curves["hard_budget"]["pass_at_1"], color="0.55", label="hard budget"
        )
    points = curves["points"]
    tilts = [point for name, point in points.items() if name == "base" or name.startswith("tilt:")]
    tilts.sort(key=lambda point: point["tokens"])
    axis.plot([p["tokens"] for p in tilts], [p["pass_at_1"] for p in tilts], color="tab:blue", alpha=0.5)
    for name, point in points.items():
        axis.errorbar(point["tokens"], point["pass_at_1"], point["error"], marker="o", capsize=2, label=name, ls="")
    axis.set(title=title, xlabel="mean tokens, end included", ylabel="Pass@1", ylim=(0, 1.03))
    axis.set_xlim(left=0)
    axis.legend(fontsize=7)
    return figure


TASKS = (
    BudgetTask("gsm8k", "tiny-math", "gsm8k"),
    BudgetTask("math500", "tiny-math", "math500"),
    BudgetTask("vqa", "tiny-vqa", "mathvista", "mathvision", generator="tiny-vl"),
)
