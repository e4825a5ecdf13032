"""Accuracy at a budget by hand: what the task makes of samples that were made up, and how it judges."""

import pytest

from lenvm_lightning.errors import EvaluationError
from lenvm_lightning.evaluation import tasks
from lenvm_lightning.evaluation.read_settings import read_settings
from lenvm_lightning.evaluation.results import Measure
from lenvm_lightning.evaluation.samples import Sample
from lenvm_lightning.evaluation.systems import budget_systems
from lenvm_lightning.evaluation.task import Measured
from lenvm_lightning.rollouts.generators.interface import GeneratedText


def answered(system, question, number, tokens, right, strict=None, truncated=False, logprob=-1.0):
    found = {"right": right, "strict": right if strict is None else strict, "answer": "3"}
    return Sample(system, question, number, tokens, "length" if truncated else "stop", logprob, found, "", [5] * tokens)


BASE = [
    answered("base", "a", 0, 10, True), answered("base", "a", 1, 20, True),
    answered("base", "b", 0, 30, True, strict=False), answered("base", "b", 1, 40, False, truncated=True),
]  # fmt: skip


def budget(**samples):
    """Findings on samples by system, `min_p` standing for `base+min-p`, `tilt` for `tilt:-5`."""
    names = {"base": "base", "min_p": "base+min-p", "tilt": "tilt:-5"}
    samples = {names[key]: found for key, found in samples.items()}
    measured = Measured(read_settings({"task": "gsm8k"}, "test"), budget_systems(list(samples)), samples, [])
    found = tasks.get("gsm8k").summarise(measured)
    [table] = found.tables
    return {row.label["system"]: row for row in table.rows}, table, found


def test_rows_of_a_budget_task_by_hand():
    rows, _, _ = budget(base=BASE)
    row = rows["base"]
    assert (row.samples, row.questions) == (4, 2)
    # Questions: 2 of 2 and 1 of 2 are right; the spread of (1, .5) is sqrt(.125), by the root of 2 questions.
    assert row.measures["pass_at_1"] == Measure(0.75, pytest.approx(0.25))
    assert row.measures["pass_at_1_strict"] == Measure(0.5, pytest.approx(0.5))
    assert row.measures["tokens"] == Measure(25.0, pytest.approx(10.0))
    assert row.measures["truncated_share"] == Measure(0.25)
    assert row.measures["logprob_per_token"] == Measure(pytest.approx(-4 / 100))
    assert not {"tokens_share", "budget_pass_at_1", "gain"} & set(row.measures)


def test_a_guided_system_beside_the_hard_budget_by_hand():
    """Guided mean 17.5 tokens. Truncated at 20, base has lengths 10 20 20 20 (mean 17.5) and half its answers."""
    guided = [
        answered("tilt:-5", q, k, t, True) for q, k, t in (("a", 0, 10), ("a", 1, 20), ("b", 0, 15), ("b", 1, 25))
    ]
    rows, _, found = budget(base=BASE, tilt=guided)
    measures = rows["tilt:-5"].measures
    assert measures["tokens"].value == 17.5
    assert measures["tokens_share"] == Measure(0.7)
    assert measures["budget_pass_at_1"].value == pytest.approx(0.5)
    assert measures["pass_at_1"].value == 1.0
    assert measures["gain"].value == pytest.approx(0.5)
    assert measures["gain"].low <= measures["gain"].value <= measures["gain"].high
    assert found.curves["points"]["tilt:-5"] == {"tokens": 17.5, "pass_at_1": 1.0, "error": 0.0}
    budgets = dict(zip(found.curves["hard_budget"]["tokens"], found.curves["hard_budget"]["pass_at_1"], strict=True))
    assert budgets[17.5] == 0.5
    assert budgets[25.0] == 0.75  # nothing is truncated


def test_gain_is_negative_where_truncation_does_better():
    guided = [answered("tilt:-5", q, k, 17, False) for q in "ab" for k in (0, 1)]
    rows, _, _ = budget(base=BASE, tilt=guided)
    gain = rows["tilt:-5"].measures["gain"]
    assert gain.value < 0
    assert gain.value == -rows["tilt:-5"].measures["budget_pass_at_1"].value


def test_unguided_systems_beside_base_have_no_gain():
    other = [answered("base+min-p", q, k, 20, True) for q in "ab" for k in (0, 1)]
    rows, _, _ = budget(base=BASE, min_p=other)
    assert "gain" not in rows["base+min-p"].measures
    assert rows["base+min-p"].measures["tokens_share"] == Measure(0.8)
    assert "budget_pass_at_1" in rows["base+min-p"].measures


def test_gain_is_of_the_questions_that_both_have_answered():
    """A server may have failed one; base then has b in [30, 40] tokens, and half its answers at 40."""
    rows, _, _ = budget(base=BASE, tilt=[answered("tilt:-5", "b", 0, 30, True)])
    assert rows["tilt:-5"].measures["gain"].value == pytest.approx(0.5)
    rows, _, _ = budget(base=BASE, tilt=[answered("tilt:-5", "c", 0, 30, True)])
    assert "gain" not in rows["tilt:-5"].measures


def test_without_base_there_is_no_hard_budget():
    rows, table, found = budget(tilt=[answered("tilt:-5", "a", 0, 10, True, logprob=None)], base=[])
    assert list(rows) == ["tilt:-5"]
    assert "gain" not in rows["tilt:-5"].measures
    assert rows["tilt:-5"].measures["logprob_per_token"] == Measure(None)
    assert "hard_budget" not in found.curves
    assert any(note.startswith("No hard budget") for note in table.notes)


def test_the_report_counts_verdicts_that_differ():
    _, table, _ = budget(base=BASE)
    assert table.notes[-1] == "In 1 samples the two verdicts differ; both are in samples.jsonl."


def judged(text, **meta):
    found = tasks.get("vqa").judge(meta, GeneratedText(text, [4, 2], "stop", None, 0))
    return found["right"], found["strict"], found["answer"]


CHOICES = ["5 cm", "7 cm", "9 cm"]


@pytest.mark.parametrize(("text", "meta", "right"), [
    # MathVista: the answer is the text of a choice.
    (r"So \boxed{B}.", {"answer": "7 cm", "choices": CHOICES, "answer_type": "text"}, True),
    (r"So \boxed{7 cm}.", {"answer": "7 cm", "choices": CHOICES, "answer_type": "text"}, True),
    (r"So \boxed{(C) 9 cm}.", {"answer": "7 cm", "choices": CHOICES, "answer_type": "text"}, False),
    (r"\boxed{A}", {"answer": "7 cm", "choices": CHOICES, "answer_type": "text"}, False),
    # MathVision: the answer is a letter; without options it is a value.
    (r"\boxed{B}", {"answer": "B", "options": ["4", "8", "12"]}, True),
    (r"\boxed{8}", {"answer": "B", "options": ["4", "8", "12"]}, True),
    (r"\boxed{12}", {"answer": "B", "options": ["4", "8", "12"]}, False),
    (r"\boxed{B}", {"answer": "B", "options": ["C", "A", "B"]}, True),
    (r"\boxed{0.5}", {"answer": r"\frac{1}{2}", "options": []}, True),
    # Integers, floats with decimals that count, lists.
    (r"\boxed{14}", {"answer": "14", "answer_type": "integer", "precision": None, "choices": None}, True),
    (r"\boxed{15}", {"answer": "14", "answer_type": "integer", "precision": None, "choices": None}, False),
    (r"\boxed{1.24}", {"answer": "1.2", "answer_type": "float", "precision": 1.0, "choices": None}, True),
    (r"\boxed{1.26}", {"answer": "1.2", "answer_type": "float", "precision": 1.0, "choices": None}, False),
    (r"\boxed{1.24}", {"answer": "1.20", "answer_type": "float", "precision": 2.0, "choices": None}, False),
    (r"\boxed{1.24}", {"answer": "1.2", "answer_type": "float", "precision": "1", "choices": None}, True),
    (r"\boxed{[2, 4, 6]}", {"answer": "[2, 4, 6]", "answer_type": "list", "precision": None, "choices": None}, True),
    (r"\boxed{2, 4}", {"answer": "[2, 4]", "answer_type": "list", "precision": None, "choices": None}, True),
    (r"\boxed{4, 2}", {"answer": "[2, 4]", "answer_type": "list", "precision": None, "choices": None}, False),
    ("I do not know", {"answer": "14", "answer_type": "integer", "precision": None, "choices": None}, False),
    (r"\boxed{18}", {"answer": 18}, True),
])  # fmt: skip
def test_judging(text, meta, right):
    assert judged(text, **meta)[0] is right


@pytest.mark.parametrize("meta", [{}, {"answer": ""}, {"answer": " ", "choices": ["1", "2"]}])
def test_a_question_without_an_answer_cannot_be_judged(meta):
    with pytest.raises(EvaluationError, match="no answer to judge by"):
        judged(r"\boxed{2}", **meta)
    assert judged(r"\boxed{0}", answer=0)[0]


def test_both_verdicts_are_kept():
    assert judged(r"\boxed{0.5}", answer=r"\frac{1}{2}") == (True, False, "0.5")
    assert judged(r"\boxed{3}", answer="3") == (True, True, "3")
