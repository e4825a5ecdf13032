"""Whether two short answers are equal: as strings, as numbers with their units, or by algebra, the cheapest first."""

import re
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from .latex import equivalent

MAX_LENGTH = 1000  # characters; longer answers are compared as strings only
_NEAR = Fraction(1, 2_000_000)  # how far 0.333333 may be from 1/3
_MAX_EXPONENT = 400

_SYMBOLS = str.maketrans(
    {
        "\x0c": "\\f", "\x08": "\\b",  # of \frac and \binom in strings that were not raw
        "−": "-", "–": "-", "×": "\\times ", "·": "\\cdot ", "÷": "/", "π": "\\pi ", "∞": "\\infty ",
        "≤": "\\le ", "≥": "\\ge ", "²": "^2", "³": "^3", "½": "\\frac{1}{2}", "¼": "\\frac{1}{4}",
        "¾": "\\frac{3}{4}", "°": "^\\circ", "∪": "\\cup ", "±": "\\pm ", "，": ",", "\xa0": " ", "\u202f": " ",
    }
)  # fmt: skip
_REWRITES = [
    (re.compile(pattern), new)
    for pattern, new in (
        (r"\\left(?![a-zA-Z])|\\right(?![a-zA-Z])|\\displaystyle(?![a-zA-Z])|\\!", ""),
        (r"\\[bB]igg?[lr]?(?![a-zA-Z])", ""),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\frac\s*(\d)\s*(\d)(?!\d)", r"\\frac{\1}{\2}"),
        (r"\{,\}", ","),
        (r"(?<!\\)\\[,;:> ]|~|\\quad(?![a-zA-Z])|\\qquad(?![a-zA-Z])", " "),
        (r"√\s*(\d+|[a-zA-Z])", r"\\sqrt{\1}"),
        (r"√\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"\\textdollar(?![a-zA-Z])|\\\$", "$"),
        (r"\\%", "%"),
        (r"\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-zA-Z]))|\s*\\degree(?![a-zA-Z])|(?<=[\d}])\s*degrees?$", ""),
        (
            r"\\(?:text(?:bf|it|rm|sf)|math(?:bf|it|rm|sf)|bm|boldsymbol|mbox|emph)(?![a-zA-Z])",
            r"\\text",
        ),
        (r"\s+", " "),
    )
]
_WRAPPED = re.compile(
    r"\\(?:text|boxed|fbox)\s*\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}|\*\*([^*]+)\*\*|`([^`]+)`|\"([^\"]+)\""
)


@lru_cache(maxsize=1 << 16)
def clean(text: str) -> str:
    r"""Return an answer without what does not change it: `$` around math, spacing, sizes, a box, a final full stop.

    Degrees lose their sign, and the many ways to write text in LaTeX become ``\text``. What is longer than
    `MAX_LENGTH` is only trimmed: some patterns take time quadratic in the length.
    """
    if len(text) > MAX_LENGTH:
        return text.strip()
    text = text.translate(_SYMBOLS).strip()
    dollars = re.findall(r"(?<!\\)\$", text)
    if dollars and len(dollars) % 2 == 0:
        text = re.sub(r"(?<!\\)\$", "", text)
    text = re.sub(r"(?<!\\)\\[()\[\]]", "", text)
    for pattern, new in _REWRITES:
        text = pattern.sub(new, text)
    previous = None
    while text != previous:
        previous = text
        text = text.strip().rstrip(".,;:").strip()
        if wrapped := _WRAPPED.fullmatch(text):
            text = next(part for part in wrapped.groups() if part is not None)
    return text


class Number(NamedTuple):
    """A number as it was written.

    Attributes:
        value: exact, before a percent sign or a unit is applied.
        percent: it has a percent sign.
        unit: what follows or, of money, precedes it; empty if nothing.
        name: `x` in ``x = 5``; empty if nothing.
    """

    value: Fraction
    percent: bool
    unit: str
    name: str = ""


_NUMBER = re.compile(
    r"""(?:(?P<name>\\?[a-zA-Z]+(?:_\{?\w+\}?)?)\s*(?:=|\\approx)\s*)?
    (?P<sign>[-+]?)\s*(?P<money>[$€£]?)\s*(?P<inner>-?)
    (?:
      (?:(?P<mixed>\d+)\s*)?\\frac\s*(?:\{\s*(?P<over>-?\d+)\s*\}\s*\{\s*(?P<under>\d+)\s*\}|(?P<o1>\d)\s*(?P<u1>\d))
      | (?:(?P<mixed2>\d+)\s+)?(?P<over2>\d+)\s*/\s*(?P<under2>\d+)
      | (?P<whole>[1-9]\d{0,2}(?:,\s?\d{3})+(?![\d,])|[1-9]\d{0,2}(?:\ \d{3})+(?!\d)|\d*)(?P<part>\.\d*)?
        (?:\s*(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*(?:\{\s*(?P<ten>[-+]?\d+)\s*\}|(?P<ten1>[-+]?\d+))
          |[eE](?P<ten2>[-+]?\d+))?
    )
    (?P<percent>\s*(?:%|percent\b|per\ cent\b))?
    (?P<unit>.*)""",
    re.VERBOSE | re.DOTALL,
)
_METRE, _GRAM, _SECOND, _LITRE, _DOLLAR = "m", "g", "s", "l", "$"
_UNITS: dict[str, tuple[str, Fraction]] = {
    name: (base, Fraction(factor))
    for base, names in {
        _METRE: "m meter metre=1 cm centimeter centimetre=1/100 mm millimeter millimetre=1/1000 dm=1/10 "
        "km kilometer kilometre=1000 in inch inches=127/5000 ft foot feet=381/1250 "
        "yd yard=1143/1250 mile mi=201168/125",
        _GRAM: "g gram=1 kg kilogram=1000 mg milligram=1/1000",
        _SECOND: "s sec second=1 min minute=60 h hr hour=3600 day=86400 week=604800",
        _LITRE: "l liter litre=1 ml milliliter millilitre=1/1000",
        _DOLLAR: "$ dollar usd=1 cent ¢=1/100",
    }.items()
    for names, factor in re.findall(r"([^=]+)=(\S+)\s?", names)
    for name in names.split()
}
# Words after a number that change it, or make it something else than a number.
_NO_UNITS = re.compile(
    r"(?:and|or|to|pi|sqrt|over|half|less|more|plus|minus|infinity|factorial|squared|cubed|dozen|hundred|thousand"
    r"|million|billion|trillion|if|when|for|because|since|is|not)",
    re.IGNORECASE,
)
_UNIT = re.compile(r"([a-zµ¢$][a-zµ.'’/* -]*?)\s*(?:\^\s*\{?\s*(-?\d)\s*\}?)?", re.ASCII | re.IGNORECASE)


def number(text: str) -> Number | None:
    r"""Return the number that an answer is, or None: ``1,234``, ``-$18.00``, ``\frac12``, ``2 1/2``, ``5\text{ cm}``.

    ``2k`` and ``2\pi`` are none: only what stands in ``\text``, a known unit or a word of three letters is a unit.
    """
    found = _NUMBER.fullmatch(clean(text)) if len(text) <= MAX_LENGTH else None
    value = _value(found.groupdict()) if found else None
    unit = _unit(found["unit"]) if found else None
    if found is None or value is None or unit is None:
        return None
    if (found["sign"] == "-") != (found["inner"] == "-"):
        value = -value
    return Number(value, bool(found["percent"]), unit or ("$" if found["money"] == "$" else ""), found["name"] or "")


def _value(part: dict[str, str | None]) -> Fraction | None:
    over, under = part["over"] or part["o1"] or part["over2"], part["under"] or part["u1"] or part["under2"]
    if over is not None and under is not None:
        whole = int(part["mixed"] or part["mixed2"] or 0)
        return whole + Fraction(int(over), int(under)) if int(under) else None
    digits = re.sub(r"[, ]", "", part["whole"] or "") + (part["part"] or "")
    ten = int(part["ten"] or part["ten1"] or part["ten2"] or 0)
    if not any(c.isdigit() for c in digits) or abs(ten) > _MAX_EXPONENT:
        return None
    try:
        return Fraction(Decimal(digits)) * Fraction(10) ** ten
    except InvalidOperation:
        return None


def _unit(rest: str) -> str | None:
    """The unit that `rest` is, empty for none; None if it is something else."""
    if not rest.strip():
        return ""
    plain = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", rest)
    named = plain != rest
    plain = re.sub(r"\s+", " ", plain).strip()
    found = _UNIT.fullmatch(plain)
    if not found:
        return "" if named and not plain else None
    words = re.findall(r"[a-zA-Zµ¢$]+", found[1])
    if not words or any(map(_NO_UNITS.fullmatch, words)):
        return None
    if not named and _singular(words[0]) not in _UNITS and (len(words[0]) < 3 or not rest[0].isspace()):
        return None  # 2k, 3 ab, 4x^2
    if not named and len(words[0]) == 1 and not rest[0].isspace() and words[0] != "$":
        return None  # 5m and 3s may be products
    return f"{found[1].strip()}^{found[2]}" if found[2] else found[1].strip()


def _singular(word: str) -> str:
    word = word.lower()
    return word[:-1] if word.endswith("s") and len(word) > 2 else word


def _measure(unit: str) -> tuple[tuple[str, int], Fraction] | None:
    """Dimension and factor of a known unit: ``cm^2`` and ``square centimeters`` are 1/10000 of ``m^2``."""
    name, _, power = unit.partition("^")
    words, exponent = name.split(), int(power or 1)
    if len(words) == 2 and words[0].lower() in ("square", "sq", "cubic"):
        words, exponent = words[1:], 3 if words[0].lower() == "cubic" else 2
    if len(words) != 1 or _singular(words[0]) not in _UNITS:
        return None
    base, factor = _UNITS[_singular(words[0])]
    return (base, exponent), factor**exponent


def same_number(gold: Number, answer: Number, precision: int | None = None) -> bool:
    """Return whether two numbers are equal.

    A unit or name that only one of them has does not count, nor do units of which one is unknown; `50%` equals both 50
    and 0.5.

    Args:
        gold: the right one.
        answer: the other one.
        precision: decimals to which the gold is rounded, and to which the answer has to round; None: exact, except
            that a decimal equals a fraction to six places.
    """
    if gold.name and answer.name and gold.name != answer.name:
        return False
    left, right = gold.value, answer.value
    measures = _measure(gold.unit), _measure(answer.unit)
    if measures[0] and measures[1]:
        if measures[0][0] != measures[1][0]:
            return False
        left, right = left, right * measures[1][1] / measures[0][1]
    candidates = [right]
    if gold.percent != answer.percent:
        candidates.append(right / 100 if answer.percent else right * 100)
    if precision is not None:
        half = Fraction(1, 2 * 10**precision)
        return any(abs(c - round(left, precision)) <= half for c in candidates)
    return any(c == left or abs(c - left) <= _NEAR * min(Fraction(1), 1000 * abs(left)) for c in candidates)


def same_text(gold: str, answer: str) -> bool:
    """Return whether two answers are the same string, spaces aside, and for words also upper and lower case."""
    gold, answer = clean(gold), clean(answer)
    if _tight(gold) == _tight(answer):
        return bool(gold)
    plain = [re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", t).strip() for t in (gold, answer)]
    return _is_words(plain[0]) and plain[0].casefold() == plain[1].casefold()


def _tight(text: str) -> str:
    return re.sub(r"(?<!\d) | (?!\d)", "", text)  # 1 2 is not 12


def _is_words(text: str) -> bool:
    return bool(re.fullmatch(r"[^\W\d_]{2,}(?:[\s,'’-]+[^\W\d_]+)*", text))


def _is_prose(text: str) -> bool:
    # Letters of a short word may be factors: abc is cba, but stop is not pots.
    return _is_words(text) and (len(text) > 3 or text.lower() in ("yes", "no")) and text not in ("infinity", "sqrt")


@lru_cache(maxsize=1 << 17)
def equal(gold: str, answer: str, precision: int | None = None) -> bool:
    """Return whether `answer` is the answer `gold`: the same string, number or expression.

    Args:
        gold: plain text or LaTeX.
        answer: the same.
        precision: decimals that count; see `same_number`.

    Returns:
        False too where either cannot be read.
    """
    if same_text(gold, answer):
        return True
    left, right = number(gold), number(answer)
    if left and right:
        return same_number(left, right, precision)
    left_text, right_text = clean(gold), clean(answer)
    if not left_text or not right_text or max(len(left_text), len(right_text)) > MAX_LENGTH:
        return False
    if _is_prose(left_text) or _is_prose(right_text) or _other_base(left_text, right_text):
        return False
    left_text, right_text = _latex(left_text), _latex(right_text)
    if re.search(r"\d\s+\d", left_text + "," + right_text):  # math-verify would read 1 2 as 12
        return False
    return equivalent(left_text, right_text, 6 if precision is None else precision)


def _other_base(gold: str, answer: str) -> bool:
    bases = [re.fullmatch(r"-?[\dA-Z]+_\{?(\d+)\}?", text.replace(" ", "")) for text in (gold, answer)]
    return bool(bases[0] and bases[1] and bases[0][1] != bases[1][1])


def _latex(text: str) -> str:
    text = re.sub(r"(\^\{[^{}]*\}|\^\w)\s+(?=\d)", r"\1 \\cdot ", text)  # 2^{10} 11^2 is read as 2^10 · 1 · 1^2
    text = text.replace("\\varnothing", "\\emptyset").replace("%", "\\%").replace("$", "")
    return re.sub(r"(?<![\\a-zA-Z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
