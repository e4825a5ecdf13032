"""Task `length`: predicted lengths, before the first token and along the completions.

Protocol: Zhang et al., section on length prediction; 64 completions a prompt, 16 in the tiny world.
"""

from typing import TYPE_CHECKING

from ..results import Column, Measure, Table, TableRow
from ..task import Findings, Measured
from .value_task import ValueTask, read_states

if TYPE_CHECKING:
    from ..length_errors import LengthReport


class LengthTask(ValueTask):
    """Mean relative error at the prompt boundary, and errors by position; see `Task`."""

    name = "length"

    def summarise(self, measured: Measured) -> Findings:
        """Return the table of errors and the plot."""
        from ..length_errors import LengthPredictions, plot_prediction

        assert measured.lenvm is not None
        found = LengthPredictions(measured.lenvm.gamma)
        for sample, logits in read_states(measured):
            found.add(sample.prompt_id, measured.lenvm.remaining(logits), sample.truncated)
        report = found.compute()
        curves = {"by_prompt": [vars(prompt) for prompt in report.by_prompt]}
        return Findings(_tables(report), curves, {"prediction": plot_prediction(report, measured.notice)})


def _tables(report: "LengthReport") -> list[Table]:
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
        f"{report.prompts_left_out:,} prompts are left out because one of their completions was truncated "
        f"({report.completions_truncated:,} completions were). Noise of the truth: about what a perfect predictor "
        "would score against so few completions a prompt.",
    ]
    positions = [
        TableRow(
            {"position": name},
            {
                "mae_tokens": Measure(error.mae_tokens, error.mae_tokens_stderr),
                "mae_tokens_constant": Measure(error.mae_tokens_constant),
                "gain": Measure(1 - error.mae_tokens / error.mae_tokens_constant)
                if error.mae_tokens_constant
                else Measure(None),
            },
            report.completions - report.completions_truncated,
            report.prompts + report.prompts_left_out,
        )
        for name, error in report.positions.items()
    ]
    return [
        Table(
            "before the first token",
            columns,
            [TableRow({"system": "base"}, boundary, report.completions, report.prompts)],
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


TASKS = (LengthTask(n=64, n_tiny=16),)
