"""Tables by hand: what tasks make of samples that were made up."""

import math

import pytest

from lenvm_lightning.errors import EvaluationError
from lenvm_lightning.evaluation.report import as_rows
from lenvm_lightning.evaluation.results import Column, Measure, Row, Table
from lenvm_lightning.evaluation.samples import Sample
from lenvm_lightning.evaluation.settings import read_settings
from lenvm_lightning.evaluation.systems import budget_systems, wish_systems
from lenvm_lightning.evaluation.task import Measured
from lenvm_lightning.evaluation.tasks.accuracy_at_budget import BudgetTask
from lenvm_lightning.evaluation.tasks.lifebench_task import WishTask
from lenvm_lightning.rollouts.generators.interface import GeneratedText


def answered(system, question, number, tokens, right, strict=None, cut=False, logprob=-1.0):
    found = {"right": right, "strict": right if strict is None else strict, "answer": "3"}
    return Sample(system, question, number, tokens, "length" if cut else "stop", logprob, found, "", [5] * tokens)


def wished(system, item, wish, target, tokens, score, deviation, number=0):
    found = {"wish": wish, "target": target, "item": item, "lang": "en", "score": score, "deviation": deviation}
    question = f"{item}/{wish}/{target}"
    return Sample(system, question, number, tokens, "stop", -0.5 * tokens, found, "", [5] * tokens)


BASE = [
    answered("base", "a", 0, 10, True), answered("base", "a", 1, 20, True),
    answered("base", "b", 0, 30, True, strict=False), answered("base", "b", 1, 40, False, cut=True),
]  # fmt: skip


def budget(**samples):
    """Findings on samples by system, `min_p` standing for `base+min-p`, `tilt` for `tilt:-5`."""
    names = {"base": "base", "min_p": "base+min-p", "tilt": "tilt:-5"}
    samples = {names[key]: found for key, found in samples.items()}
    measured = Measured(read_settings({"task": "gsm8k"}, "test"), budget_systems(list(samples)), samples, [])
    found = BudgetTask("gsm8k", "gsm8k").summarise(measured)
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
    assert row.measures["cut_share"] == Measure(0.25)
    assert row.measures["logprob_per_token"] == Measure(pytest.approx(-4 / 100))
    assert not {"tokens_share", "budget_pass_at_1", "gain"} & set(row.measures)


def test_a_guided_system_beside_the_hard_budget_by_hand():
    """Guided mean 17.5 tokens. Cut at 20, base has lengths 10 20 20 20 (17.5 in the mean) and half its answers."""
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
    assert budgets[25.0] == 0.75  # nothing is cut


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


def wishes(samples, lengths=(16, 32), kinds=("equal to",)):
    settings = read_settings({"task": "lifebench", "lengths": list(lengths), "wishes": list(kinds)}, "test")
    systems = wish_systems(list(samples))
    return WishTask().summarise(Measured(settings, systems, samples, []))


def test_rows_of_wishes_by_hand():
    """Items score 100 and 50 at N=16, 80 and 60 at N=32: 90 and 55 in the mean, each an error of 17.5 from 72.5."""
    samples = [
        wished("base", "x", "equal to", 16, 16, 100.0, 0.0), wished("base", "y", "equal to", 16, 12, 50.0, -0.25),
        wished("base", "x", "equal to", 32, 40, 80.0, 0.25), wished("base", "y", "equal to", 32, 48, 60.0, 0.5),
    ]  # fmt: skip
    [table] = wishes({"base": samples}).tables
    short, long, mean = table.rows
    assert [row.label for row in table.rows] == [{"system": "base", "N": n} for n in ("16", "32", "mean")]
    assert [(row.samples, row.questions) for row in table.rows] == [(2, 2), (2, 2), (4, 4)]
    assert short.measures["length_score"] == Measure(75.0, pytest.approx(25.0))
    assert long.measures["length_score"] == Measure(70.0, pytest.approx(10.0))
    assert mean.measures["length_score"] == Measure(72.5, pytest.approx(17.5))
    assert short.measures["deviation"] == Measure(
        0.125, pytest.approx(0.125)
    )  # of abs(LD), by its mark not by its sign
    assert long.measures["deviation"] == Measure(0.375, pytest.approx(0.125))
    assert mean.measures["deviation"].value == 0.25
    assert short.measures["length_share"].value == 14 / 16
    assert long.measures["length_share"].value == 44 / 32
    assert mean.measures["length_share"].value == pytest.approx((14 / 16 + 44 / 32) / 2)
    assert mean.measures["tokens"].value == (14 + 44) / 2
    assert mean.measures["logprob_per_token"] == Measure(-0.5)
    assert mean.measures["cut_share"] == Measure(0.0)


def test_each_length_counts_alike_however_many_samples_it_has():
    samples = [wished("base", "x", "equal to", 16, 16, 100.0, 0.0, number) for number in range(3)]
    samples += [wished("base", "x", "equal to", 32, 48, 40.0, 0.5)]
    mean = wishes({"base": samples}).tables[0].rows[-1]
    assert mean.measures["length_score"].value == 70.0


def test_wishes_and_systems_do_not_mix():
    samples = {
        name: [
            wished(name, "x", wish, n, n, score, 0.0)
            for wish, score in (("equal to", 90.0 + plus), ("at least", 60.0 + plus))
            for n in (16, 32)
        ]
        for name, plus in (("base", 0.0), ("ours", 5.0))
    }
    found = wishes(samples, kinds=("equal to", "at least"))
    scores = {
        (table.title, row.label["system"], row.label["N"]): row.measures["length_score"].value
        for table in found.tables
        for row in table.rows
    }
    assert len(scores) == 12
    assert scores["equal to N tokens", "base", "mean"] == 90.0
    assert scores["equal to N tokens", "ours", "16"] == 95.0
    assert scores["at least N tokens", "base", "32"] == 60.0
    assert found.curves["at least/ours"] == {"N": [16, 32], "length_score": [65.0, 65.0], "tokens": [16.0, 32.0]}


def test_one_length_needs_no_mean_and_an_absent_one_no_row():
    samples = [wished("base", "x", "equal to", 16, 16, 100.0, 0.0)]
    assert [row.label["N"] for row in wishes({"base": samples}).tables[0].rows] == ["16"]


def judged(text, **meta):
    found = BudgetTask("vqa", "mathvista", "mathvision").judge(meta, GeneratedText(text, [4, 2], "stop", None, 0))
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


def test_a_table_is_one_in_markdown():
    """Every rule cell needs a dash, and nothing in a cell may end it."""
    rows = [Row({"word": "`|`"}, {"z": Measure(2.0, 0.5), "gain": Measure(0.5, None, -0.25, 1.0)}, 3, 1)]
    rows += [Row({"word": "b"}, {"z": Measure(1.0, math.nan)}, 12345, 1)]
    columns = [Column("z", "z", "up", "+.1f"), Column("gain", "gain", "down", ".2f"), Column("none", "none")]
    head, rule, *body = as_rows(Table("t", columns, rows))
    assert [cell.strip() for cell in head.strip("|").split("|")] == ["word", "n", "z ↑", "gain ↓"]
    assert all(set(cell.strip()) <= {"-", ":"} and "-" in cell for cell in rule.strip("|").split("|"))
    cells = [cell.strip() for cell in body[0].replace(r"\|", "/").strip("|").split("|")]
    assert cells == ["`/`", "3", "+2.0 ± 0.5", "0.50 [-0.25, 1.00]"]
    assert [cell.strip() for cell in body[1].strip("|").split("|")] == ["b", "12,345", "+1.0", ""]
    for narrow in ([Row({"N": "1"}, {}, 1, 1)], [Row({}, {}, 1, 1)]):
        rule = as_rows(Table("t", [], narrow))[1]
        assert all("-" in cell for cell in rule.strip("|").split("|"))


def test_a_table_without_rows_says_so():
    assert as_rows(Table("t", [Column("z", "z")], [])) == ["Nothing."]
