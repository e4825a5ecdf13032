"""Task `length`: predicted lengths, before the first token and along the completions.

Protocol: Zhang et al., section on length prediction; 64 completions a prompt, 16 in the tiny world.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ...errors import EvaluationError
from ...rollouts.generators.interface import Prompt
from ...rollouts.sample import model_of
from ...utils.settings import TEXT, setting
from ..recorded import Recorded
from ..results import Column, Measure, Table, TableRow
from ..samples import Sample, System
from ..settings import TRUTH, EvaluationSettings
from ..task import Findings, Measured, Questions
from .value_task import ValueSettings, ValueTask, read_states

if TYPE_CHECKING:
    from torch import Tensor

    from ...models.value_model import LengthValueModel
    from ..length_errors import LengthReport, PositionError
    from ..simple_predictors import Completion

_OURS = "LenVM"


@dataclass(frozen=True)
class LengthSettings(ValueSettings):
    """What this task alone can be asked."""

    learn_from: str | None = setting(
        TEXT, "rollouts.jsonl, from which simple predictors learn that stand beside the length value model", None
    )
    probe: bool = setting(TRUTH, "a linear probe of the generator's hidden state among them", False)


class LengthTask(ValueTask):
    """Mean relative error at the prompt boundary, and errors by position; see `Task`."""

    name = "length"
    version = 4
    settings = LengthSettings

    def systems(self, settings: EvaluationSettings, names: Sequence[str]) -> list[System]:
        """As every value task, once the rollouts that are named are there.

        Raises:
            EvaluationError: they are not, or a probe has none to learn from.
        """
        own: LengthSettings = settings.own
        if own.learn_from is not None and not Path(own.learn_from).is_file():
            raise EvaluationError(f"--learn-from: there is no file {own.learn_from}")
        if own.probe and own.learn_from is None:
            raise EvaluationError("--probe has nothing to learn from: name rollouts of other prompts by --learn-from")
        return super().systems(settings, names)

    def prompts_for(
        self, system: System, settings: EvaluationSettings, questions: Questions, done: Mapping[str, list[Sample]]
    ) -> Sequence[Prompt]:
        """As every task, once it is known that nothing is learned from their completions.

        Raises:
            EvaluationError: something would be.
        """
        _refuse_learned(settings, questions.prompts)
        return super().prompts_for(system, settings, questions, done)

    def recorded(self, settings: EvaluationSettings) -> Recorded | None:
        """As every value task, and nothing is learned from completions that are measured on, either."""
        found = super().recorded(settings)
        if found is not None:
            _refuse_learned(settings, found.prompts)
        return found

    def summarise(self, measured: Measured) -> Findings:
        """Return the tables of errors and the plot."""
        from ..interval_predictors import interval_predictors
        from ..interval_tables import interval_tables, plot_intervals
        from ..length_errors import LengthPredictions, plot_prediction

        assert measured.lenvm is not None
        lenvm = measured.lenvm
        found = LengthPredictions(lenvm.gamma)
        medians = LengthPredictions(lenvm.gamma) if lenvm.length_rule is not None else None
        known = _known(measured)
        intervals = interval_predictors(measured, known)
        limit = _limit(measured)
        for sample, read in read_states(measured, partial(_Read.of, lenvm)):
            found.add(sample.prompt_id, read.remaining, sample.truncated, limit)
            if medians is not None and read.median is not None:
                medians.add(sample.prompt_id, read.median, sample.truncated, limit)
            intervals.add(sample, read.at_places, limit)
        ours = found.compute()
        reports = {_OURS: ours}
        if medians is not None:
            reports["median"] = medians.compute()
        reports |= _simple_predictors(measured, known)
        curves: dict[str, Any] = {"by_prompt": [vars(prompt) for prompt in ours.by_prompt]}
        tables, figures = _tables(reports), {"prediction": plot_prediction(ours, measured.notice)}
        if scores := intervals.compute():
            of_ours = next(iter(scores.values()))
            tables += interval_tables(scores)
            figures["intervals"] = plot_intervals(of_ours, measured.notice)
            curves |= {"pit": of_ours.pit, "reliability": [list(pair) for pair in of_ours.reliability]}
        return Findings(tables, curves, figures)


class _Read(NamedTuple):
    """What is kept of a completion of L tokens: predicted remaining tokens, and outputs at a few places.

    Attributes:
        remaining: by the value. Shape (L + 1,).
        median: of the distribution; None without a head for it. Shape (L + 1,).
        at_places: outputs of all heads after so many tokens of `WRITTEN` as it has. Shape (N, 1 + K).
    """

    remaining: "Tensor"
    median: "Tensor | None"
    at_places: "Tensor"

    @classmethod
    def of(cls, lenvm: "LengthValueModel", outputs: "Tensor") -> "_Read":
        """Of the outputs at all states, (L + 1, 1 + K), which are too many to hold for every completion."""
        from ..length_errors import WRITTEN

        places = [at for at in WRITTEN if at < len(outputs) - 1]
        median = lenvm.distribution(outputs).median() if lenvm.length_rule is not None else None
        return cls(lenvm.remaining(outputs[:, 0]), median, outputs[places])


def _known(measured: Measured) -> "list[Completion] | None":
    """The completions that `--learn-from` names; None where it names none."""
    from ..simple_predictors import known_completions

    learn_from = measured.settings.own.learn_from
    return None if learn_from is None else known_completions(Path(learn_from))


def _refuse_learned(settings: EvaluationSettings, asked: Sequence[Prompt]) -> None:
    """Refuse to learn from completions of prompts that are asked, before anything is sampled or read."""
    from ..simple_predictors import known_completions

    if settings.own.learn_from is not None:
        refuse_asked(known_completions(Path(settings.own.learn_from)), asked)


def _simple_predictors(measured: Measured, known: "list[Completion] | None") -> "dict[str, LengthReport]":
    """The same errors of predictors that are easy to have; none where there is nothing to learn from."""
    from ..length_errors import LengthPredictions
    from ..simple_predictors import Probe, Regression

    own: LengthSettings = measured.settings.own
    if known is None:
        return {}
    assert measured.lenvm is not None
    prompts = {prompt.prompt_id: prompt for prompt in map(measured.prompts.__getitem__, range(len(measured.prompts)))}
    samples = [sample for sample in measured.samples["base"] if sample.token_ids]
    completions = [(prompts[sample.prompt_id], sample.token_ids) for sample in samples]
    gamma, limit = measured.lenvm.gamma, _limit(measured)
    found = {"regression": LengthPredictions(gamma)}
    regression = Regression(measured.processor, known)
    for sample, (prompt, ids) in zip(samples, completions, strict=True):
        found["regression"].add(sample.prompt_id, regression.predict(prompt, len(ids)), sample.truncated, limit)
    if own.probe:
        found["probe"] = LengthPredictions(gamma)
        backbone = measured.lenvm.backbone
        dtype = str(backbone.dtype).removeprefix("torch.")
        probe = Probe(model_of(str(measured.settings.generator)), measured.processor, dtype, backbone.device, known)
        for number, predicted in probe.predict(completions):
            found["probe"].add(samples[number].prompt_id, predicted, samples[number].truncated, limit)
    return {name: predictions.compute() for name, predictions in found.items()}


def _limit(measured: Measured) -> int:
    """Tokens at most of a completion."""
    assert measured.settings.max_tokens is not None  # every source of this task has a default
    return measured.settings.max_tokens


def refuse_asked(known: "Sequence[Completion]", asked: Sequence[Prompt]) -> None:
    """Refuse completions of prompts that are asked here: their lengths are what is to be predicted.

    Raises:
        EvaluationError: there are some.
    """
    texts = {json.dumps(prompt.messages) for prompt, _ in known}
    prompts = map(asked.__getitem__, range(len(asked)))
    alike = {prompt.prompt_id: prompt for prompt in prompts if json.dumps(prompt.messages) in texts}
    # Only where texts are the same are images opened.
    texts = {json.dumps(prompt.messages) for prompt in alike.values()}
    others = {prompt.prompt_id: prompt for prompt, _ in known if json.dumps(prompt.messages) in texts}
    learned = set(map(_content, others.values()))
    if both := [name for name, prompt in alike.items() if _content(prompt) in learned]:
        raise EvaluationError(f"--learn-from: {len(both):,} of its prompts are asked here, such as {min(both)!r}")


def _content(prompt: Prompt) -> str:
    """What a prompt asks; of images what is on them, for the same question may be asked of many."""
    return json.dumps([prompt.messages, *map(_digest_of_image, prompt.images)])


def _digest_of_image(image: Any) -> str:
    from ...utils.images import open_image

    try:
        return hashlib.blake2b(open_image(image).tobytes()).hexdigest()
    except (OSError, ValueError):
        return "it cannot be read, as whoever reads the prompt will say"


def _tables(reports: "Mapping[str, LengthReport]") -> list[Table]:
    ours = reports[_OURS]
    prompts = ours.prompts + ours.prompts_left_out
    positions = {name: {by: report.positions[name] for by, report in reports.items()} for name in ours.positions}
    written = {str(at): {by: report.written[at] for by, report in reports.items()} for at in ours.written}
    simple = []
    if len(reports) > 1:
        simple = [
            "median: of the predicted distribution, where the length value model has one. regression: of "
            "log(1 + remaining) on the lengths of prompt and text so far, as logarithms; probe: on the generator's "
            "hidden state after half of its layers. Both learned what remained within the limit of their rollouts, "
            "which should be that of this evaluation."
        ]
    return [
        _before_the_first_token(reports),
        _errors(
            "by position",
            "position",
            positions,
            [
                "Of completions that ended. The best constant knows that they did, and their position: at 75% it knows "
                "that a quarter is left.",
                *simple,
            ],
            prompts,
        ),
        _errors(
            "by tokens written",
            "written",
            written,
            [
                "What remained within the limit, of all completions that went on then, truncated ones among them; the "
                "best constant is of these."
            ],
            prompts,
        ),
    ]


def _before_the_first_token(reports: "Mapping[str, LengthReport]") -> Table:
    columns = [
        Column("mre", "MRE", "down"),
        Column("mre_constant", "best constant"),
        Column("mre_of_sampling", "noise of the truth"),
        Column("bias_tokens", "bias, tokens", None, "+.1f"),
        Column("spearman", "rank correlation", "up", ".2f"),
    ]
    rows = [
        TableRow(
            {"predictor": name},
            {
                "mre": Measure(report.mre, report.mre_stderr),
                "mre_constant": Measure(report.mre_constant),
                "mre_of_sampling": Measure(report.mre_of_sampling),
                "bias_tokens": Measure(report.bias_tokens, report.bias_tokens_stderr),
                "spearman": Measure(report.spearman),
            },
            report.completions,
            report.prompts,
        )
        for name, report in reports.items()
    ]
    ours = reports[_OURS]
    notes = [
        f"{ours.prompts_left_out:,} prompts are left out because one of their completions was truncated "
        f"({ours.completions_truncated:,} completions were). Noise of the truth: about what a perfect predictor "
        "would score against so few completions a prompt.",
    ]
    return Table("before the first token", columns, rows, notes)


def _errors(
    title: str,
    label: str,
    places: "Mapping[str, Mapping[str, PositionError]]",
    notes: list[str],
    prompts: int,
) -> Table:
    """Mean absolute errors at some places of the completions, of each predictor."""
    rows = []
    others = list(dict.fromkeys(by for errors in places.values() for by in errors if by != _OURS))
    for place, errors in places.items():
        ours = errors[_OURS]
        best = ours.mae_tokens_constant
        measures = {
            "mae_tokens": Measure(ours.mae_tokens, ours.mae_tokens_stderr),
            "mae_tokens_constant": Measure(best),
            "gain": Measure(1 - ours.mae_tokens / best if best else None),
        }
        if ours.spearman is not None:
            measures["spearman"] = Measure(ours.spearman)
        measures |= {by: Measure(errors[by].mae_tokens, errors[by].mae_tokens_stderr) for by in others}
        rows.append(TableRow({label: place}, measures, ours.completions, prompts))
    ranked = any("spearman" in row.measures for row in rows)
    columns = [
        Column("mae_tokens", "mean absolute error, tokens", "down", ".1f"),
        Column("mae_tokens_constant", "best constant", None, ".1f"),
        Column("gain", "gain", "up", "+.0%"),
        *([Column("spearman", "rank correlation", "up", ".2f")] if ranked else []),
        *(Column(by, by, "down", ".1f") for by in others),
    ]
    return Table(title, columns, rows, notes)


TASKS = (LengthTask(n=64, n_tiny=16),)
