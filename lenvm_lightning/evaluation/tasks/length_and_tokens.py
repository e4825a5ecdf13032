"""Tasks that measure a length value model on completions of the unguided generator: ``length`` and ``tokens``."""

from collections.abc import Iterator, Mapping
from typing import Any, get_args

from torch import Tensor
from torch.utils.data import Subset

from ...errors import EvaluationError
from ...rollouts.generators.interface import GeneratedText
from ...rollouts.prompting import tokenizer_of
from ...rollouts.prompts import load_prompts
from ..results import Column, Measure, Row, Table
from ..rollout_values import values_of
from ..samples import Sample, System
from ..settings import EvaluationSettings
from ..task import Findings, Measured, Questions, ids_of
from .length_errors import LengthPredictions, LengthReport, plot_prediction
from .length_tokens import DIRECTIONS, LengthTokens, Ranking, TokenReport, plot_words

_TINY = {"tiny-vl": ["tiny-vqa"]}
_BY = {"mean": "by mean residual", "share": "by share beyond the threshold"}
_TINY_PROMPTS = 60
_SHOWN = 12  # words of a ranking in the report; all of them are in results.json


class _ValueTask:
    """What both share: prompts as training takes them, and the generator unguided."""

    version = 1
    needs_lenvm = True

    def defaults(self, tiny: bool) -> dict[str, Any]:
        """Return sampling as that of rollouts, temperature 1 without truncation."""
        drawing = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
        fewer = {"n": 16, "limit": _TINY_PROMPTS, "max_tokens": 768}
        return {**drawing, **(fewer if tiny else {"max_tokens": 5000})}

    def questions(self, settings: EvaluationSettings, tiny: bool) -> Questions:
        """Return prompts that were not trained on, as far as their source says."""
        if tiny:
            own = _TINY.get(settings.generator or "", ["tiny-math", "tiny-write"])
            names = own if settings.data in (None, "tiny") else [settings.data]
            limit = settings.limit or _TINY_PROMPTS
            sources: list[str | dict[str, Any]] = [
                {"source": name, "seed": 1, "limit": share}
                for place, name in enumerate(names)
                if (share := (limit + place) // len(names))
            ]
            prompts = load_prompts(sources, split="test")
            return Questions(prompts, _TINY_PROMPTS, prompts.description)
        if settings.data is None:
            raise EvaluationError("--data is missing: prompts that the length value model was not trained on")
        prompts = load_prompts(settings.data, split=None if settings.data_is_file else "test")
        kept: Any = Subset(prompts, range(min(settings.limit or len(prompts), len(prompts))))  # type: ignore[arg-type]
        return Questions(kept, len(prompts), prompts.description)

    def systems(self, settings: EvaluationSettings, guided: bool, tiny: bool) -> list[System]:
        """Return the unguided generator: lengths under a control are another matter."""
        if settings.systems not in (None, ["base"]):
            raise EvaluationError(f"{settings.task} measures completions of `base` alone, found {settings.systems}")
        return [System("base")]

    def judge(self, meta: Mapping[str, Any], completion: GeneratedText) -> dict[str, Any]:
        """Return nothing: there is no right and wrong."""
        return {}


def _read(measured: Measured) -> Iterator[tuple[Sample, Tensor]]:
    """Samples with the logits of all their states.

    Raises:
        EvaluationError: a prompt that the length value model cannot read.
    """
    samples = [sample for sample in measured.samples["base"] if sample.token_ids]
    places = {prompt_id: place for place, prompt_id in enumerate(ids_of(measured.prompts))}
    cache: dict[str, Any] = {}

    def prompt_of(sample: Sample) -> Any:
        if sample.prompt_id not in cache:
            cache.clear()  # samples of a prompt follow one another
            cache[sample.prompt_id] = measured.prompts[places[sample.prompt_id]]
        return cache[sample.prompt_id]

    assert measured.lenvm is not None
    pairs = ((prompt_of(sample), sample.token_ids) for sample in samples)
    found: dict[int, Tensor] = {}
    for number, logits in values_of(measured.lenvm, measured.processor, pairs):
        if isinstance(logits, str):
            raise EvaluationError(f"prompt {samples[number].prompt_id!r} cannot be read: {logits}")
        found[number] = logits
    # In the order of the samples, so that sums do not depend on how they were batched.
    yield from ((samples[number], found[number]) for number in sorted(found))


class LengthTask(_ValueTask):
    """Predicted lengths: mean relative error at the prompt boundary, and errors along the completions.

    Protocol: Zhang et al., section on length prediction; 64 completions a prompt, 16 in the tiny world.
    """

    def defaults(self, tiny: bool) -> dict[str, Any]:
        """Return the paper's settings."""
        return {"n": 64, **super().defaults(tiny)}

    def summarise(self, measured: Measured) -> Findings:
        """Return the table of errors and the plot."""
        assert measured.lenvm is not None
        found = LengthPredictions(measured.lenvm.gamma)
        for sample, logits in _read(measured):
            found.add(sample.prompt_id, measured.lenvm.remaining(logits), sample.cut)
        report = found.compute()
        curves = {"by_prompt": [vars(prompt) for prompt in report.by_prompt]}
        figure = plot_prediction(report, tiny_world=bool(measured.notice))
        return Findings(_length_tables(report), curves, {"prediction": figure})


def _length_tables(report: LengthReport) -> list[Table]:
    boundary = {
        "mre": Measure(report.mre, report.mre_stderr),
        "mre_constant": Measure(report.mre_constant),
        "mre_of_sampling": Measure(report.mre_of_sampling),
        "bias_tokens": Measure(report.bias_tokens, report.bias_tokens_stderr),
        "spearman": Measure(report.spearman),
    }
    columns = [
        Column("mre", "MRE", "down"),
        Column("mre_constant", "best constant"),
        Column("mre_of_sampling", "noise of the truth"),
        Column("bias_tokens", "bias, tokens", None, "+.1f"),
        Column("spearman", "rank correlation", "up", ".2f"),
    ]
    notes = [
        f"{report.prompts_left_out:,} prompts are left out because one of their completions was cut at the limit "
        f"({report.completions_cut:,} completions were). Noise of the truth: about what a perfect predictor would "
        "score against so few completions a prompt.",
    ]
    positions = [
        Row(
            {"position": name},
            {
                "mae_tokens": Measure(error.mae_tokens, error.mae_tokens_stderr),
                "mae_tokens_constant": Measure(error.mae_tokens_constant),
                "gain": Measure(1 - error.mae_tokens / error.mae_tokens_constant)
                if error.mae_tokens_constant
                else Measure(None),
            },
            report.completions - report.completions_cut,
            report.prompts + report.prompts_left_out,
        )
        for name, error in report.positions.items()
    ]
    return [
        Table(
            "before the first token",
            columns,
            [Row({"system": "base"}, boundary, report.completions, report.prompts)],
            notes,
        ),
        Table(
            "by position",
            [
                Column("mae_tokens", "mean absolute error, tokens", "down", ".1f"),
                Column("mae_tokens_constant", "best constant", None, ".1f"),
                Column("gain", "gain", "up", "+.0%"),
            ],
            positions,
            ["The best constant knows the position: at 75% it knows that a quarter is left."],
        ),
    ]


class TokensTask(_ValueTask):
    """Length tokens: which words make the expected end come nearer, and which put it off."""

    def defaults(self, tiny: bool) -> dict[str, Any]:
        """Return a handful of completions a prompt: words are many."""
        return {**super().defaults(tiny), "n": 8}

    def summarise(self, measured: Measured) -> Findings:
        """Return a ranking for each direction, and the clouds."""
        assert measured.lenvm is not None
        found = LengthTokens(tokenizer_of(measured.processor), measured.lenvm.config.rule)
        for sample, logits in _read(measured):
            found.add(sample.prompt_id, sample.token_ids, logits, not sample.cut)
        report = found.compute(measured.settings.threshold)
        words = [vars(word) for word in report.words]
        figures = {
            f"words_by_{by}": plot_words(report, by=by, tiny_world=bool(measured.notice)) for by in ("mean", "share")
        }
        return Findings(_token_tables(report), {"words": words}, figures)


def _token_tables(report: TokenReport) -> list[Table]:
    columns = [
        Column("mean_residual", "mean residual", None, "+.4f"),
        Column("z", "z", None, "+.1f"),
        Column("share_longer", "goes on longer", None, ".1%"),
        Column("share_sooner", "ends sooner", None, ".1%"),
    ]
    chance = "–" if report.chance_z is None else f"{report.chance_z:.1f}"
    notes = [
        f"Residual: -(1 - γ) + γV after the word - V before it; above 0 the end has come nearer than expected. Shares: "
        f"of occurrences beyond {report.threshold}. Words of at least {report.minimum} prompts. With residuals "
        f"shuffled among the words of each prompt the largest z is {chance}. Mean residual of all tokens "
        f"{report.mean_residual:+.5f}.",
    ]
    tables: list[Table] = []
    for direction in DIRECTIONS:
        for by in get_args(Ranking):
            rows = [
                Row(
                    {"word": f"`{word.word}`"},
                    {
                        "mean_residual": Measure(word.mean_residual, word.stderr),
                        **{name: Measure(getattr(word, name)) for name in ("z", "share_longer", "share_sooner")},
                    },
                    word.count,
                    word.prompts,
                )
                for word in report.ranking(direction, by, _SHOWN)
            ]
            tables.append(
                Table(
                    f"{direction}, {_BY[by]}",
                    columns,
                    rows,
                    notes if not tables else [],
                )
            )
    return tables
