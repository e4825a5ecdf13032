from fractions import Fraction

from lenvm_lightning.evaluation.judge.equality import equal, number


def test_numbers_with_their_units():
    assert number("-$1,234.50") == (Fraction(-2469, 2), False, "$", "")
    assert number(r"x = 5\text{ cm}^2") == (5, False, "cm^2", "x")
    assert number("2k") is number(r"2\pi") is number("9/0") is number("1e999999999") is number("two") is None


def test_equal_reads_both_sides():
    assert equal("$5^{\\circ}$", "5")
    assert not equal("", "")
