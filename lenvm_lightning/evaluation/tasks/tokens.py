"""Task `tokens`: length tokens, words after which the expected end comes nearer, and which put it off."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from ...utils.settings import NUMBER, setting
from ..results import Column, Measure, Table, TableRow
from ..task import Findings, Measured
from .value_task import ValueSettings, ValueTask, read_states

if TYPE_CHECKING:
    from ..length_tokens import TokenReport

_BY = {"mean": "by mean residual", "share": "by share beyond the threshold"}
_SHOWN = 12  # words of a ranking in the report; all of them are in results.json
_N = 8  # completions a prompt: a handful, for words are many


@dataclass(frozen=True)
class TokenSettings(ValueSettings):
    """What this task alone can be asked."""

    threshold: float = setting(NUMBER, "residuals beyond it count", 0.01)


class TokensTask(ValueTask):
    """Rankings of words in both directions; see `Task`."""

    name = "tokens"
    settings = TokenSettings

    def summarise(self, measured: Measured) -> Findings:
        """Return a ranking for each direction, and the clouds."""
        from ...models.processors import tokenizer_of
        from ..length_tokens import LengthTokens, plot_words

        assert measured.lenvm is not None
        found = LengthTokens(tokenizer_of(measured.processor), measured.lenvm.config.rule)
        for sample, logits in read_states(measured, lambda outputs: outputs[:, 0].clone()):
            found.add(sample.prompt_id, sample.token_ids, logits, not sample.truncated)
        report = found.compute(measured.settings.own.threshold)
        words = [vars(word) for word in report.words]
        figures = {
            "words_by_mean": plot_words(report, measured.notice, by="mean"),
            "words_by_share": plot_words(report, measured.notice, by="share"),
        }
        return Findings(_tables(report), {"words": words}, figures)


def _tables(report: "TokenReport") -> list[Table]:
    from ..length_tokens import DIRECTIONS, Ranking

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
                TableRow(
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


TASKS = (TokensTask(n=_N, n_tiny=_N),)
