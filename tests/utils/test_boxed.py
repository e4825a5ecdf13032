import time

import pytest

from lenvm_lightning.utils.boxed import last_boxed


@pytest.mark.parametrize(
    ("text", "held"),
    [
        (r"so \boxed{4}", "4"),
        (r"\boxed{1} and then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{4}, not \boxed{}", "4"),
        (r"\boxed{4} and \boxed{5", "4"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        ("4", None),
    ],
)
def test_the_last_box_that_is_closed_and_not_empty(text, held):
    assert last_boxed(text) == held


def test_last_boxed_is_linear_in_the_text():
    started = time.monotonic()
    assert last_boxed(r"\boxed{5}" + r"\boxed{" * 100_000) == "5"
    assert time.monotonic() - started < 5
