"""How LongBench-Write counts words and scores lengths: its own rules, as pure functions."""

import re

_TOO_LONG, _TOO_SHORT = 3.0, 2.0  # how many times too much, and too little, makes the score fall by 100
_CHINESE = re.compile("[\u4e00-\u9fff]")
_LATIN = re.compile(r"\b[a-zA-Z]+\b")


def count_words(text: str) -> int:
    """Words of a text as the benchmark counts them: Chinese characters, and runs of Latin letters between boundaries.

    Letters beside a digit or a Chinese character have no boundary there: `GPT4` and `用Python写` have no Latin word.
    """
    return len(_CHINESE.findall(text)) + len(_LATIN.findall(text))


def words_score(words: int, required: int) -> float:
    """Return S_l in [0, 100].

    Args:
        words: that were written.
        required: that the prompt asks for.

    Raises:
        ValueError: nothing is required.
    """
    if required < 1:
        raise ValueError(f"the required length must be at least 1 word, got {required}")
    if words > required:
        return 100 * max(0.0, 1 - (words / required - 1) / _TOO_LONG)
    if words == 0:
        return 0.0
    return 100 * max(0.0, 1 - (required / words - 1) / _TOO_SHORT)


def language_of(prompt: str) -> str:
    """`cn` where a prompt has more Chinese characters than Latin words, else `en`; the benchmark does not say."""
    return "cn" if len(_CHINESE.findall(prompt)) > len(_LATIN.findall(prompt)) else "en"
