"""Verdicts on the paper's claims: what was not measured, or within chance, never holds."""

from dataclasses import replace

import pytest

from lenvm_lightning.evaluation.results import Column, Measure, Results, Table, TableRow
from lenvm_lightning.evaluation.tasks.paper_claims import judge


def results(task, rows, title="t"):
    table = Table(title, [Column("x", "x")], rows)
    return Results(task, 1, True, 2, 2, 4, 0, {"generator": {"name": "tiny-text"}}, [table])


def verdicts(about, *found):
    return [claim.verdict for claim in judge(found, {}, "base") if claim.about == about]


def tilt(beta, low):
    numbers = {"pass_at_1": Measure(0.9), "tokens_share": Measure(0.5), "budget_pass_at_1": Measure(0.4)}
    return TableRow({"system": f"tilt:{beta}"}, {**numbers, "gain": Measure(0.5, low=low, high=0.6)}, 4, 2)


@pytest.mark.parametrize(("rows", "verdict"), [
    ([], "not testable here"),
    ([TableRow({"system": "base"}, {}, 4, 2)], "not testable here"),
    ([tilt(-5, 0.1), tilt(-10, 0.2)], "holds"),
    ([tilt(-5, 0.1), tilt(-10, -0.2)], "does not hold"),
    ([tilt(-5, None)], "does not hold"),
])  # fmt: skip
def test_every_tilt_has_to_beat_the_budget(rows, verdict):
    assert verdicts("frontier, text", results("gsm8k", rows)) == [verdict]


@pytest.mark.parametrize(("error", "verdict"), [
    (1.0, "holds"),  # 10 is more than 1.96 * sqrt(2)
    (4.0, "does not hold"),  # and less than 1.96 * 4 * sqrt(2)
    (None, "not testable here"),
    (float("nan"), "not testable here"),
])  # fmt: skip
def test_a_difference_has_to_be_larger_than_its_error(error, verdict):
    rows = [
        TableRow({"system": name, "N": "mean"}, {
            "length_score": Measure(score, error), "length_share": Measure(1.0), "logprob_per_token": Measure(-0.5),
        }, 4, 2)
        for name, score in (("base", 40.0), ("ours", 50.0))
    ]  # fmt: skip
    found = results("lifebench", rows, "at least N tokens")
    assert verdicts("LIFEBench, at least", found) == [verdict]


def run(loss):
    return {"metrics": {"loss": loss}, "parameters": 1, "train_prompts": 1, "train_completions": 1}


@pytest.mark.parametrize(("grouped", "verdict"), [(1.5, "does not hold"), (2.0, "holds")])
def test_single_runs_differ_by_more_than_seeds(grouped, verdict):
    """Three seeds with a deviation of 0.1: Student's t of two degrees of freedom, 4.30 * sqrt(2) * 0.1 = 0.608."""
    runs = {"r": run(1.0), "seed-1": run(0.9), "seed-2": run(1.1)}
    runs |= {"batches-shuffled": run(1.0), "batches-grouped": run(grouped)}
    [claim] = [claim for claim in judge([], runs, "r") if claim.about == "ablation, batches"]
    assert claim.verdict == verdict
    assert "seeds differ by 0.608" in claim.found


@pytest.mark.parametrize(("z", "verdict"), [
    ({"wait": -5.0, "therefore": 4.0}, "holds"),
    ({"wait": -1.0, "therefore": 4.0}, "does not hold"),  # within chance
    ({"wait": -5.0, "therefore": 4.0, "but": 3.0}, "does not hold"),  # one on the wrong side
    ({"wait": -5.0}, "does not hold"),
])  # fmt: skip
def test_words_lie_on_their_sides(z, verdict):
    words = [{"word": word, "z": value, "mean_residual": value / 100} for word, value in z.items()]
    found = replace(results("tokens", []), curves={"words": words})
    assert verdicts("length tokens", found) == [verdict]
