"""The judge of formulas, in a process of its own: it ends, and any thread may ask it."""

import threading
import time

from lenvm_lightning.evaluation.judge import latex
from lenvm_lightning.evaluation.judge.answers import judge


def test_hostile_answers_end(monkeypatch):
    started = time.monotonic()
    monkeypatch.setattr(latex, "_judge", latex._Judge(seconds=1.0))
    for answer in ("9^{9^{9^{9}}}", "10000000!"):
        assert not judge(f"\\boxed{{{answer}}}", "4")
    assert latex.equivalent("k+1", "1+k")  # by a new process
    for answer in (
        "(" * 100_000,
        "9" * 100_000,
        "\\frac{" * 15_000,
        "$" * 99_999,
        "1," * 50_000,
        "\\" * 100_001,
        f"1{' ' * 99_999}2",
    ):
        assert not judge(f"The answer is {answer}", "4")
        assert not judge(f"\\boxed{{{answer}}}", "4")
        assert not judge(answer, "4", ["1", "4"])
    assert time.monotonic() - started < 20


def test_judges_in_any_thread():
    verdicts = {}

    def work(i):
        verdicts[i] = [judge(f"\\boxed{{{i}(k+{j})}}", f"{i}k+{i * 2}") for j in (1, 2, 3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == {i: [False, True, False] for i in range(2, 8)}
