"""Tokens to text, as they come: no half characters, nothing behind a stop text, and no token read twice."""

from collections.abc import Callable, Sequence
from typing import Any

HALF = "\ufffd"  # what a decoder says of half a character
_MOST_BYTES = 4  # of one


class TextStream:
    """The text of one completion.

    Args:
        tokenizer: of its vocabulary.
        stops: texts after which it ends.
        keep: True = the one that ended it is part of it.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = (), *, keep: bool = False) -> None:
        self._tokenizer, self._keep = tokenizer, keep
        self._stops = stops
        self._held = max(map(len, stops), default=1) - 1  # characters that may be the beginning of a stop text
        self._ids: list[int] = []  # of which the text is not settled yet, and some before them
        self._settled = 0  # characters of theirs that are in `text`
        self.text = ""
        self._shown = 0
        self._stopped = False

    def add(self, token_id: int, last: bool) -> str:
        """Take a token in.

        Args:
            token_id: the token; below 0 for none.
            last: True = none comes after it.

        Returns:
            What can be shown now that could not before.
        """
        if self._stopped:
            return ""
        if token_id >= 0:
            self._ids.append(token_id)
        known = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        if last or not known.endswith(HALF) or len(self._ids) > 2 * _MOST_BYTES:
            self.text += known[self._settled :]
            # Decoded again with the token before it: a tokenizer may need it to know about a blank.
            self._ids = self._ids[-1:]
            self._settled = len(self._tokenizer.decode(self._ids, skip_special_tokens=True))
        end = len(self.text) if last else max(self._shown, len(self.text) - self._held)
        stopped = [(place, stop) for stop in self._stops if (place := self.text.find(stop)) >= 0]
        if stopped:
            place, stop = min(stopped)
            self.text = self.text[: place + len(stop) if self._keep else place]
            end = len(self.text)
            self._stopped = True
        shown, self._shown = self.text[self._shown : end], max(self._shown, end)
        return shown


def ends_with_stop(stops: Sequence[str], tokenizer: Any) -> Callable[[list[int]], bool] | None:
    """Whether a text holds one of some stop strings at its end; None where there are none.

    Args:
        stops: the strings, none of them empty.
        tokenizer: decodes what was written.
    """
    if not stops:
        return None
    # A token is a byte at least, but for the first ones, which may be parts of a character.
    tail = max(len(text.encode()) for text in stops) + 2 * _MOST_BYTES

    def ending(ids: list[int]) -> bool:
        written = tokenizer.decode(ids[-tail:])
        return any(text in written for text in stops)

    return ending
