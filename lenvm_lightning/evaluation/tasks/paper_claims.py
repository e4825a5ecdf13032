"""Task `paper`: the paper's claims beside what was found in miniature: holds, does not hold, or not testable here.

A claim about means holds where its sign does and its 95% interval excludes nothing; one about single training runs
where the difference is larger than what other seeds of the base run differ by. Everything else does not hold: neither
does what points the right way within chance.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from ...rollouts.constraint import Constraint
from .. import tiny_world
from ..results import Measure, Results, TableRow
from ..task import RecipeTask

ClaimVerdict = Literal["holds", "does not hold", "not testable here"]
_Z = 1.96
_T = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}  # the same of so few seeds
_LONGER, _SOONER = ("wait", "but", "let", "think"), ("therefore", "clearly")


@dataclass(frozen=True)
class Claim:
    """A claim.

    Attributes:
        about: section or figure of the paper, in words.
        claim: what it says, with its number.
        found: what was found here.
        verdict: what follows.
    """

    about: str
    claim: str
    found: str
    verdict: ClaimVerdict


class _Evidence:
    """Results by task and generator, and finished runs by name, `base` among them.

    Args:
        results: of the evaluations.
        runs: results of training runs by folder name.
        base: name of the run that the others are variants of.
    """

    def __init__(self, results: Sequence[Results], runs: Mapping[str, dict[str, Any]], base: str) -> None:
        self._results = {(one.task, str((one.provenance.get("generator") or {}).get("name"))): one for one in results}
        self.runs = {"base" if name == base else name: run for name, run in runs.items()}

    def row(self, task: str, generator: str, table: int = 0, **label: str) -> TableRow:
        """A line of a table.

        Raises:
            KeyError: it was not measured.
        """
        for row in self._results[task, generator].tables[table].rows:
            if all(row.label.get(key) == value for key, value in label.items()):
                return row
        raise KeyError(label)

    def rows(self, task: str, generator: str, table: int = 0) -> list[TableRow]:
        """All lines of a table."""
        return self._results[task, generator].tables[table].rows

    def titled(self, task: str, generator: str, title: str) -> list[TableRow]:
        """All lines of the table of this title."""
        [table] = [table for table in self._results[task, generator].tables if table.title == title]
        return table.rows

    def curves(self, task: str, generator: str) -> dict[str, Any]:
        """Points of the plots of a task."""
        return self._results[task, generator].curves

    def metric(self, run: str, name: str) -> float:
        """A number of a training run's validation."""
        return float(self.runs[run]["metrics"][name])

    def noise(self, name: str) -> float:
        """How far two runs that differ by their seed alone lie apart at most, 95 times of 100 (Student's t)."""
        values = [self.metric(run, name) for run in self.runs if run == "base" or run.startswith("seed-")]
        if len(values) < 2:
            raise KeyError("seed-*")
        return _T.get(len(values), _Z) * 2**0.5 * statistics.stdev(values)


def judge(results: Sequence[Results], runs: Mapping[str, dict[str, Any]], base: str) -> list[Claim]:
    """Judge every claim; those whose evidence was not measured are not testable."""
    evidence, claims = _Evidence(results, runs, base), []
    for about, claim, look in _CLAIMS:
        try:
            found, holds = look(evidence)
            claims.append(Claim(about, claim, found, "holds" if holds else "does not hold"))
        except (KeyError, ValueError) as error:
            claims.append(Claim(about, claim, f"not measured ({error})", "not testable here"))
    return claims + [Claim(about, claim, why, "not testable here") for about, claim, why in _UNTESTABLE]


class PaperTask(RecipeTask):
    """The claims as a Markdown table; see `RecipeTask`."""

    name = "paper"
    recipe = "paper_tiny"

    def as_markdown(self, results: Sequence[Results], runs: Mapping[str, dict[str, Any]], base: str) -> str:
        """Return every claim with what was found here."""
        claims = judge(results, runs, base)
        count = {verdict: sum(claim.verdict == verdict for claim in claims) for verdict in ("holds", "does not hold")}
        rows = [f"| {claim.about} | {claim.claim} | {claim.found} | **{claim.verdict}** |" for claim in claims]
        return "\n".join([
            "# The paper in miniature",
            "",
            f"> {tiny_world.NOTICE}. What holds here need not hold for large models, nor the other way round.",
            "",
            f"{count['holds']} claims hold, {count['does not hold']} do not, "
            f"{len(claims) - sum(count.values())} cannot be tested here. Zhang et al., arXiv 2604.27039.",
            "",
            "| about | the paper's claim | here | |",
            "|---|---|---|---|",
            *rows,
            "",
        ])  # fmt: skip


def _told(measure: Measure, form: str = ".1f") -> str:
    error = f" ± {format(measure.error, form)}" if measure.error is not None else ""
    return "–" if measure.value is None else f"{format(measure.value, form)}{error}"


def _above(a: Measure, b: Measure) -> bool:
    """Whether a is larger than b, beyond chance."""
    if a.value is None or b.value is None:
        raise ValueError("a number is missing")
    errors = [one.error for one in (a, b) if one.error is not None and math.isfinite(one.error)]
    if not errors:
        raise ValueError("too few questions for an error")
    return a.value - b.value > _Z * math.hypot(*errors)


# -- evaluations ------------------------------------------------------------------------------------------------------


def _boundary(generator: str) -> Callable[[_Evidence], tuple[str, bool]]:
    def look(evidence: _Evidence) -> tuple[str, bool]:
        row = evidence.row("length", generator).measures
        told = f"MRE {_told(row['mre'], '.3f')}, best constant {_told(row['mre_constant'], '.3f')}"
        noise = row["mre_of_sampling"]
        return f"{told} (noise of the truth {_told(noise, '.3f')})", _above(row["mre_constant"], row["mre"])

    return look


def _shrinks(evidence: _Evidence) -> tuple[str, bool]:
    rows = [evidence.row("length", "tiny-text", 1, position=at) for at in ("start", "25", "50", "75")]
    errors = [row.measures["mae_tokens"] for row in rows]
    told = ", ".join(_told(error) for error in errors)
    return f"{told} tokens at 0, 25, 50, 75%", _above(errors[0], errors[-1])


def _constraint(constraint: Constraint, system: str) -> Callable[[_Evidence], tuple[str, bool]]:
    def look(evidence: _Evidence) -> tuple[str, bool]:
        rows = {
            row.label["system"]: row.measures
            for row in evidence.titled("lifebench", "tiny-text", f"{constraint} N tokens")
            if row.label["N"] == "mean"
        }
        parts = [
            f"{name} {_told(found['length_score'])} (length/N {_told(Measure(found['length_share'].value), '.2f')}, "
            f"log p {_told(found['logprob_per_token'], '.2f')})"
            for name, found in rows.items()
        ]
        return "Length Score " + ", ".join(parts), _above(rows[system]["length_score"], rows["base"]["length_score"])

    return look


def _frontier(task: str, generator: str) -> Callable[[_Evidence], tuple[str, bool]]:
    def look(evidence: _Evidence) -> tuple[str, bool]:
        rows = [row for row in evidence.rows(task, generator) if row.label["system"].startswith("tilt:")]
        if not rows:
            raise KeyError("tilt:*")
        parts = []
        for row in rows:
            found, beta = row.measures, row.label["system"].removeprefix("tilt:")
            parts.append(
                f"β {beta}: {_told(Measure(found['pass_at_1'].value), '.3f')} with "
                f"{_told(Measure(found['tokens_share'].value), '.2f')} of the tokens, hard budget "
                f"{_told(found['budget_pass_at_1'], '.3f')}"
            )
        lows = [row.measures["gain"].low for row in rows]
        return "; ".join(parts), all(low is not None and low > 0 for low in lows)

    return look


def _words(evidence: _Evidence) -> tuple[str, bool]:
    every = {word["word"]: word for word in evidence.curves("tokens", "tiny-text")["words"]}
    told, right = [], []
    for words, sign in ((_LONGER, -1), (_SOONER, 1)):
        known = [every[word] for word in words if word in every]
        told.append(", ".join(f"{word['word']} {word['mean_residual']:+.3f} (z {word['z']:+.1f})" for word in known))
        sides = [sign * word["z"] > _Z for word in known]
        right.append(any(sides) and not any(sign * word["z"] < -_Z for word in known))
    return f"longer: {told[0] or 'none was written'}; sooner: {told[1] or 'none was written'}", all(right)


# -- training runs ----------------------------------------------------------------------------------------------------


def _scaling(prefix: str, axis: str) -> Callable[[_Evidence], tuple[str, bool]]:
    def look(evidence: _Evidence) -> tuple[str, bool]:
        names = [name for name in evidence.runs if name.startswith(prefix)]
        names.sort(key=lambda name: evidence.runs[name][axis])
        if not names:
            raise KeyError(prefix)
        losses = [evidence.metric(name, "loss") for name in [*names, "base"]]
        told = ", ".join(
            f"{evidence.runs[name][axis]:,.0f}: {loss:.5f}" for name, loss in zip([*names, "base"], losses, strict=True)
        )
        noise = evidence.noise("loss")
        rising = all(a > b - noise for a, b in pairwise(losses))
        return f"loss {told} (seeds differ by {noise:.5f})", rising and losses[0] - losses[-1] > noise

    return look


def _target(evidence: _Evidence) -> tuple[str, bool]:
    names = ["base", *[name for name in evidence.runs if name.startswith("target-")]]
    told = ", ".join(
        f"{name.removeprefix('target-').replace('base', 'discounted')} {evidence.metric(name, 'mre'):.3f}"
        for name in names
    )
    noise = evidence.noise("mre")
    best = min(evidence.metric(name, "mre") for name in names[1:])
    return f"MRE {told} (seeds differ by {noise:.3f})", evidence.metric("base", "mre") < best - noise


def _gamma(evidence: _Evidence) -> tuple[str, bool]:
    names = sorted(
        (n for n in evidence.runs if n.startswith("gamma-") or n == "base"), key=lambda n: evidence.runs[n]["gamma"]
    )
    if len(names) < 2:
        raise KeyError("gamma-*")
    told = "; ".join(
        f"γ {evidence.runs[name]['gamma']:g}: {evidence.metric(name, 'mae_tokens/start'):.1f} at the start, "
        f"{evidence.metric(name, 'mae_tokens/75'):.1f} at 75%"
        for name in names
    )
    low, high = names[0], names[-1]
    far = evidence.metric(low, "mae_tokens/start") - evidence.metric(high, "mae_tokens/start")
    near = evidence.metric(high, "mae_tokens/75") - evidence.metric(low, "mae_tokens/75")
    return f"MAE, tokens: {told}", far > evidence.noise("mae_tokens/start") and near > evidence.noise("mae_tokens/75")


def _same(run: str, what: str) -> Callable[[_Evidence], tuple[str, bool]]:
    def look(evidence: _Evidence) -> tuple[str, bool]:
        ours, base, noise = evidence.metric(run, "loss"), evidence.metric("base", "loss"), evidence.noise("loss")
        return f"{what} {ours:.5f}, base {base:.5f} (seeds differ by {noise:.5f})", abs(ours - base) <= noise

    return look


def _lower(better: str, worse: str) -> Callable[[_Evidence], tuple[str, bool]]:
    def look(evidence: _Evidence) -> tuple[str, bool]:
        a, b = evidence.metric(better, "loss"), evidence.metric(worse, "loss")
        noise = evidence.noise("loss")
        return f"loss {better} {a:.5f}, {worse} {b:.5f} (seeds differ by {noise:.5f})", b - a > noise

    return look


def _lambda(evidence: _Evidence) -> tuple[str, bool]:
    names = ["base", *[name for name in evidence.runs if name.startswith("lambda-")]]
    if len(names) < 2:
        raise KeyError("lambda-*")
    told = ", ".join(f"{name.replace('base', 'lambda-1')} {evidence.metric(name, 'mre'):.3f}" for name in names)
    noise = evidence.noise("mre")
    best = min(evidence.metric(name, "mre") for name in names[1:])
    return f"MRE {told} (seeds differ by {noise:.3f})", evidence.metric("base", "mre") <= best + noise


_CLAIMS: list[tuple[str, str, Callable[[_Evidence], tuple[str, bool]]]] = [
    ("length prediction, text", "known before the first token: MRE 17 to 33% at 1.5B", _boundary("tiny-text")),
    ("length prediction, images", "the same for a vision-language model", _boundary("tiny-vl")),
    ("error by position", "errors shrink as the text is written", _shrinks),
    (
        "LIFEBench, equal to",
        "guidance raises the score, 25.6 to 62.6 (the paper's control)",
        _constraint("equal to", "paper"),
    ),
    ("LIFEBench, equal to", "the same with this project's default control", _constraint("equal to", "ours")),
    (
        "LIFEBench, at least",
        "guidance raises the score, 89.1 to 99.5 (this project's control)",
        _constraint("at least", "ours"),
    ),
    (
        "LIFEBench, at most",
        "guidance keeps the score, 98.5 and 96.1 (this project's control raises it)",
        _constraint("at most", "ours"),
    ),
    ("frontier, text", "the tilt beats a hard budget of its length: 63% against 6%", _frontier("gsm8k", "tiny-text")),
    ("frontier, images", "the same on MathVista", _frontier("vqa", "tiny-vl")),
    ("scaling, model size", "larger models have less loss", _scaling("layers-", "parameters")),
    ("scaling, prompts", "more prompts, less loss", _scaling("prompts-", "train_prompts")),
    ("scaling, completions a prompt", "more completions, less loss", _scaling("completions-", "train_completions")),
    ("ablation, target", "the discounted return beats raw, normalised and log lengths", _target),
    ("ablation, γ", "large γ resolves far ends, small γ near ones", _gamma),
    ("ablation, λ", "λ = 1 is best, or as good as any", _lambda),
    ("ablation, precision", "bf16 gives the same curve as fp32", _same("precision-bf16", "loss of bf16-mixed")),
    (
        "ablation, batches",
        "shuffled batches beat those that keep a prompt together",
        _lower("batches-shuffled", "batches-grouped"),
    ),
    ("length tokens", "`wait`, `but`, `let`, `think` go on longer; `therefore`, `clearly` end sooner", _words),
]
_UNTESTABLE = [
    ("LIFEBench, other models", "Qwen2.5-7B 30.9 to 64.8, Qwen3-30B-A3B 36.8 to 67.2; best closed model 53.2",
     "needs those models"),
    ("scaling to 32B", "MRE falls from 17.0/29.0/33.0% (1.5B) to 9.8/14.9/17.1% (32B)", "needs those models"),
    ("ablation, precision", "fp16 gives the same curve too", "needs a GPU: there is no fp16 autocast on a CPU"),
    ("reinforcement learning", "a length-only critic", "proposed, not measured in the paper either"),
]  # fmt: skip


TASKS = (PaperTask(),)
