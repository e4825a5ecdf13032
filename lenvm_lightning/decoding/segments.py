"""A segment: what a completion writes up to a text, such as the thinking up to `</think>`.

Labels and decoding agree on its end: the token with which the text first stands in what was written. A token may hold
more than the text, and the text may take several tokens.
"""

from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..errors import GenerationError
from ..guidance import Control, target_of, until_of
from .text_stream import HALF, ends_with_stop

_TO_THE_END = "the end of the completion"


def tokens_until(ids: Sequence[int], text: str, tokenizer: Any) -> int | None:
    """Tokens of a completion up to and with the one that completes the first occurrence of a text; None without one.

    Args:
        ids: of the completion.
        text: not empty.
        tokenizer: decodes them, special tokens included.
    """
    ids = list(ids)
    if text not in tokenizer.decode(ids):
        return None
    lengths = range(1, len(ids) + 1)
    return lengths[bisect_left(lengths, True, key=lambda length: text in tokenizer.decode(ids[:length]))]


class Segment:
    """Where segments of a vocabulary end; use `segment_of`, which makes each once.

    Args:
        until: the text that ends them.
        tokenizer: of the vocabulary.

    Attributes:
        until: the text.
        tokens: that writing it out takes at most, from wherever a part of it is written.

    Raises:
        GenerationError: no tokens write the text.
    """

    def __init__(self, until: str, tokenizer: Any) -> None:
        self.until = until
        self._tokenizer = tokenizer
        self._tail = len(until.encode()) + 8  # tokens: each is a byte at least, but for parts of a character
        self._ended = ends_with_stop((until,), tokenizer)
        pieces = pieces_of(tokenizer)
        # A place is how many characters of the text have been written. From each the longest token that fits leads on.
        self._next = [_longest_prefix(pieces, until[place:]) for place in range(len(until))]
        if HALF in until or any(token is None for token in self._next):
            raise GenerationError(
                f"until {until!r}: the tokenizer writes a character of it in parts, which no control can end a segment "
                "with; use a text of ordinary characters"
            )
        steps = [0] * (len(until) + 1)
        for place in reversed(range(len(until))):
            steps[place] = 1 + steps[place + len(pieces[self._next[place]])]  # type: ignore[index]
        self.tokens = max(steps)
        self._closing = [_closing_ids(pieces, until, place) for place in range(len(until))]

    def is_ended_by(self, ids: Sequence[int]) -> bool:
        """Whether the last of the tokens written so far has completed the text, or an earlier one close to it."""
        assert self._ended is not None
        return self._ended(list(ids))

    def place(self, ids: Sequence[int]) -> int:
        """Characters of the text that stand at the end of what was written."""
        written = self._tokenizer.decode(list(ids[-self._tail :]))
        return next(k for k in reversed(range(len(self.until))) if written.endswith(self.until[:k]))

    def closing(self, place: int) -> Tensor:
        """Ids of the tokens that complete the text from a place. Shape (n,), int64; n may be 0."""
        return self._closing[place]

    def next_id(self, place: int) -> int:
        """The token that leads on from a place to the end of the text."""
        token = self._next[place]
        assert token is not None
        return token


@lru_cache(maxsize=32)
def segment_of(until: str, tokenizer: Any) -> Segment:
    """The segment of a text and a tokenizer; the first one of a tokenizer reads all of its vocabulary.

    Raises:
        GenerationError: see `Segment`.
    """
    return Segment(until, tokenizer)


def why_not_until(control: Control | None, until: str | None, tokenizer: Any) -> str | None:
    """Why a control and a length value model do not go together; None where they do, as with no control.

    Args:
        control: of a segment, or of the whole text.
        until: what the length value model counts to; None = the end of the completion.
        tokenizer: of the generator; None where nobody can decode.
    """
    wanted = until_of(control)
    if control is None or wanted == until:
        if wanted is None:
            return None
        if tokenizer is None:
            return f"control {control} needs tokenizer: without it nobody can read where the segment ends"
        try:
            needed = segment_of(wanted, tokenizer).tokens
        except GenerationError as error:
            return f"control {control}: {error}"
        if (target_of(control) or needed) < needed:
            return f"control {control}: to write {wanted!r} alone takes {needed} tokens; raise n"
        return None
    counts, ends = (_TO_THE_END if one is None else repr(one) for one in (until, wanted))
    advice = (
        "use AtMost or EqualTo with that text (at-most:N:until=TEXT)"
        if wanted is None
        else f"train one with fit.data.init_args.until: {wanted!r}"
    )
    return (
        f"control {control} counts to {ends}, and the length value model to {counts}: {advice}, or another length "
        "value model"
    )


@lru_cache(maxsize=4)
def pieces_of(tokenizer: Any) -> list[str]:
    """What each token adds to a text in which it is not the first."""
    first = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
    before = len(tokenizer.decode(first))
    texts = tokenizer.batch_decode([[*first, token] for token in range(len(tokenizer))])
    return [text[before:] for text in texts]


def _longest_prefix(pieces: Sequence[str], text: str) -> int | None:
    """The token that is the longest beginning of a text; None where none is."""
    fitting = [token for token, piece in enumerate(pieces) if piece and text.startswith(piece)]
    return max(fitting, key=lambda token: len(pieces[token]), default=None)


def _closing_ids(pieces: Sequence[str], until: str, place: int) -> Tensor:
    written, rest = until[:place], set(until[: place + 1])  # it may begin anywhere in what is written, too
    found = [
        token
        for token, piece in enumerate(pieces)
        if (piece[:1] in rest or until in piece) and until in written + piece
    ]
    return torch.tensor(found, dtype=torch.int64)
