"""The judge of answers: a table of right and wrong ones, and the verdicts that came with real answers."""

import json

import pytest
from places import SHARED

from lenvm_lightning.evaluation.judge.answers import Verdict, extract, judge, judge_strict, verdict

DATA = SHARED / "data"
RIGHT = [
    ("1,234", "1234"), ("1000", r"1{,}000"), ("1000", r"1\,000"), ("13456", r"13,\! 456"), ("0.35", ".35"),
    ("$18.00", "18"), ("18 dollars", "$18"), ("18", r"\$18"), ("1.50", r"\$1.50"), ("50%", "50"), ("0.5", r"50\%"),
    ("10", r"10\%"), ("-3", "−3"), ("5", "5.0"), ("5", "x=5"), ("x=5", "5"), ("-3", "x = -3"),
    (r"\frac{1}{2}", "0.5"), ("0.5", r"\dfrac12"), (r"-\frac{1}{2}", r"\frac{-1}{2}"), ("7/3", r"\frac{7}{3}"),
    ("2.5", r"2\frac{1}{2}"), ("2.5", "2 1/2"), ("1/3", "0.333333"), ("\frac{17}{19}", r"\frac{17}{19}"),
    (r"$\boxed{\frac{5}{8}}$", "0.625"), (r"60^\circ", "60"), ("60", r"60^{\circ}"), ("60", "60 degrees"),
    ("5", r"5\text{ cm}"), ("5 cm", "50 mm"), ("9", r"9 \text{ in.}"), ("6", r"6 \text{ square inches}"),
    (r"3\sqrt{3}", r"3\sqrt{3}\text{ cm}^2"), ("1.6e-19", r"1.6\times10^{-19}"), ("300000000", r"3\times 10^8"),
    (r"\sqrt{8}", r"2\sqrt{2}"), ("2k+2", "2(k+1)"), ("x^2+2x+1", "(x+1)^2"), ("y=2x+3", "y = 3+2x"),
    (r"4\pi", "4π"), (r"\{1,2\}", r"\{2,1\}"), ("1,2", "2, 1"), (r"\pm 2", "2,-2"), (r"3 \text{ and } 5", "3,5"),
    ("(1,2)", r"\left(1,2\right)"), ("[0,1)", "[0, 1)"), ("x<2", r"(-\infty, 2)"), ("7 - 2i", "-2i+7"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"), ("12_5", "12_{5}"),
    ("Yes", "yes."), ("Yes", r"\text{Yes}"), (r"\text{May 4}", "May 4"), ("[1, 2, 3]", "1, 2, 3"), ("7", "7"),
    (r"\frac{5^3}{2^{10} 11^2}", r"\frac{125}{123904}"),
]  # fmt: skip
WRONG = [
    ("2k+2", "2"), ("2", "2k+2"), ("(1,2)", "(2,1)"), ("(2,1)", "(3,1)"), ("[0,1)", "(0,1]"), ("[0,1)", "[0,1]"),
    ("5 cm", "5 m"), ("5 kg", "5 cm"), ("18", "-18"), ("18", "18x"), ("2", r"2\pi"), ("1e-7", "2e-7"),
    (r"1.6\times10^{-19}", r"1.7\times10^{-19}"), ("18", "81"), ("x=5", "y=5"), ("12_5", "12_7"), ("5", "5 or 6"),
    ("5", "5 million"), ("1/3", "0.33"), ("2.5", "2"), ("3", "3, 4"), ("3", "3 h 20 min"), ("12", "1 2"), ("18", ""),
    ("35", "3,5"), ("Yes", "No"), ("stop", "pots"), ("even", "odd"), (r"\frac{1}{2}", r"\frac{1}{3}"),
    (r"\sqrt{2}", r"\sqrt{3}"), ("[1, 2, 3]", "[3, 2, 1]"), ("[1, 2, 3]", "[1, 2]"), ("5", r"\frac{5}{0}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "answer"), RIGHT)
def test_right_answers(gold, answer):
    assert judge(f"So it is \\boxed{{{answer}}}.", gold)


@pytest.mark.parametrize(("gold", "answer"), WRONG)
def test_wrong_answers(gold, answer):
    assert not judge(f"So it is \\boxed{{{answer}}}.", gold)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"first \boxed{1}, then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, \text{a}\}} and a stray }", r"\{1, \text{a}\}"),
        (r"\boxed{3} and, cut off, \boxed{\frac{1", "3"),
        (r"Put it into \boxed{}: it is \boxed{4}, not \boxed{}.", "4"),
        (r"<think>\boxed{1}</think>The answer is 2.", "2"),
        (r"thoughts \boxed{1}</think> so 7", "7"),
        (r"<think>maybe \boxed{1}", None),
        (r"<think>\boxed{1}</think>", None),
        ("", None),
        ("So he pays 7 * 4 = $<<7*4=28>>28\nA: 28", "28"),
        ("so she has 18\n#### 18", "18"),
        ("**Answer:** 5", "5"),
        ("The final answer is 3.5. I hope it is right", "3.5"),
        ("The answer is (C).", "(C)"),
        ("The correct answer is:\n\n**B. a square**", "B"),
        ("The answer is 3.\n\n**Solution:**\n\nAdd 1 to 2.", "3"),
        ("The answer is 12 and not 13", "12"),
        ("The answer is 18 dollars because 9 * 2 = 18.", "18 dollars"),
        (r"So the area is $A = \frac{1}{2}$.", r"\frac{1}{2}"),
        ("There are 2 ways to colour it.", "2"),
        ("Yes.", "Yes"),
        ("I do not\nknow it at all", None),
    ],
)
def test_extract_finds_the_final_answer(text, answer):
    assert extract(text) == answer


VISION = ["$4 \\mathrm{~cm}$", "8", "10", "$\\frac{1}{2}$", "circle"]


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("D", "D", True), ("(D)", "D", True), (r"\text{(D)}", "D", True), (r"\textbf{D}", "D", True),
        ("D. 0.5", "D", True), (r"(D) \frac{1}{2}", "D", True), ("0.5", "D", True), (r"\dfrac12", "D", True),
        ("E", "circle", True), ("Circle", "circle", True), ("circle", "E", True), ("4", "A", True), ("8", "B", True),
        ("C", "D", False), ("0.25", "D", False), ("D", "circle", False), ("F", "A", False), ("(A) and (D)", "D", False),
        ("A, D", "D", False), ("(A),(B),(C),(D),(E)", "A", False),
    ],
)  # fmt: skip
def test_choices_by_letter_or_text(answer, gold, right):
    assert judge(f"\\boxed{{{answer}}}", gold, VISION) is right


def test_letters_that_are_texts():
    assert judge(r"\boxed{A}", "A", ["B", "A"])  # MathVista: the text
    assert judge(r"\boxed{(B)}", "A", ["B", "A"])
    assert judge(r"\boxed{E}", "E", list("METRO"), kind="letter")  # MATH-Vision: the letter
    assert judge(r"\boxed{O}", "E", list("METRO"), kind="letter")
    assert not judge(r"\boxed{(B)}", "E", list("METRO"), kind="letter")


def test_precision_of_mathvista():
    assert judge("The answer is 1.449", "1.45", precision=2.0, kind="float")
    assert judge(r"\boxed{1.4}", "1.45", precision=1)  # 1.45 rounds to 1.4, half to even
    assert not judge("The answer is 1.46", "1.45", precision=2)
    assert judge(r"\boxed{\frac{1}{3}}", "0.33", precision=2)
    assert judge(r"\boxed{\sqrt{2}}", "1.41", precision=2)
    assert not judge(r"\boxed{\frac{1}{3}}", "0.33")
    assert not judge("7.4", "7", kind="integer")
    assert judge("7", "7", precision=float("nan"))


def test_lists():
    for answer in ("[1, 2]", "1, 2", "1 and 2", "(1, 2.0)", "['1', '2']"):
        assert judge(f"The answer is {answer}", "[1, 2]", kind="list")
    assert not judge("The answer is [2, 1]", "[1, 2]", kind="list")
    assert judge("The answer is [0.51, 3]", "[0.5, 3.0]", kind="list", precision=1)


def test_both_verdicts_stand_side_by_side():
    assert verdict(r"\boxed{0.5}", r"\frac{1}{2}") == Verdict("0.5", right=True, strict=False)
    assert verdict(r"\boxed{ 18 }", "18") == Verdict("18", right=True, strict=True)
    assert verdict("<think>18", "18") == Verdict(None, right=False, strict=False)
    assert not judge_strict(r"\boxed{18.0}", "18")
    assert judge_strict(r"\boxed{C}", "10", VISION)
    assert judge_strict(r"\boxed{10}", "C", VISION)


@pytest.mark.shared
@pytest.mark.skipif(not DATA.exists(), reason="the real data is not beside this checkout")
def test_agrees_with_every_verdict_on_gsm8k():
    lines = (DATA / "gsm8k" / "model_solutions.jsonl").read_text(encoding="utf-8").splitlines()
    agreed = []
    for row in map(json.loads, lines):
        gold = extract(row["ground_truth"])
        agreed += [judge(s["solution"], gold) == s["is_correct"] for s in row.values() if isinstance(s, dict)]
    assert len(agreed) == 3676
    assert sum(agreed) == 3676


@pytest.mark.shared
@pytest.mark.skipif(not DATA.exists(), reason="the real data is not beside this checkout")
@pytest.mark.parametrize(
    ("every", "count", "agreed"), [(9, 300, 295), pytest.param(1, 2700, 2643, marks=pytest.mark.slow)]
)
def test_agrees_with_the_verdicts_on_mathvision(every, count, agreed):
    lines = (DATA / "mathvision" / "problems.jsonl").read_text(encoding="utf-8").splitlines()
    verdicts = [
        (judge(r["text"], problem["answer"], problem["options"], kind="letter"), r["correct"])
        for problem in map(json.loads, lines[::every])
        for r in problem["responses"]
    ]
    assert len(verdicts) == count
    assert sum(ours == theirs for ours, theirs in verdicts) >= agreed
    # What theirs calls right is right, but for one, whose value is another one than the gold.
    assert sum(theirs and not ours for ours, theirs in verdicts) <= 1
