"""Ways to a length that need no training: what controls are measured beside, `countdown:N` and `feedback:N`.

``countdown:N`` asks the model to number its words down to the end (CAPEL, arXiv:2508.13805); the numbers cost tokens,
and are taken out of the text before it is judged. ``feedback:N`` stops at the end of each sentence and tells the model
how much it has used (arXiv:2601.01768); what is told is read and not written, so it is not counted.
"""

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..decoding.sampling_params import SamplingParams
from ..rollouts.generators.interface import Answer, Failure, GeneratedText, Generator, Prompt, PromptRequest

_SENTENCE_ENDS = (". ", "! ", "? ", "\n")
_COUNTS = re.compile(r"<(?:used_tokens=)?\d+>")
_MOST_SENTENCES = 64  # the rest is written without further interruption
_TOGETHER = 256  # completions that go through their rounds side by side

_COUNTDOWN = (
    "\n\nUse at most {n} words, and count them down as you write: before each word print how many are left, as in "
    "<{n}>First <{m}>second, one word after each number, none left out. Give your final answer before you reach <0>, "
    "and stop there."
)
_FEEDBACK = (
    "\n\nUse at most {n} tokens. After each sentence you are told how many you have used, as in <used_tokens={m}>. "
    "Make sure that you give your final answer before {n} are used."
)


@dataclass(frozen=True)
class Rival:
    """One of them, for a limit.

    Attributes:
        kind: ``countdown`` or ``feedback``.
        n: the limit, words or tokens.
    """

    kind: str
    n: int

    @classmethod
    def parse(cls, name: str) -> "Rival | None":
        """The rival of a name; None for other names.

        Raises:
            ValueError: one without a limit.
        """
        kind, _, number = name.partition(":")
        if kind not in _HINTS:
            return None
        if not number.isdecimal() or int(number) < 1:
            raise ValueError(f"{kind} takes a limit of at least 1, as in {kind}:200")
        return cls(kind, int(number))

    def prompt(self, prompt: Prompt) -> Prompt:
        """The question with what this rival adds to it."""
        *others, last = prompt.messages
        added = _HINTS[self.kind].format(n=self.n, m=max(self.n - 1, 0))
        return replace(prompt, messages=[*others, {**last, "content": last["content"] + added}])

    def read(self, written: GeneratedText) -> GeneratedText:
        """The text without the numbers; its tokens are those that were written, numbers and all."""
        return replace(written, text=re.sub(" +", " ", _COUNTS.sub(" ", written.text)).strip())


_HINTS = {"countdown": _COUNTDOWN, "feedback": _FEEDBACK}


class WithFeedback:
    """A generator in this process that is told after each sentence how many tokens it has used.

    Args:
        generator: that writes.
        tokenizer: of its vocabulary.
    """

    def __init__(self, generator: Generator, tokenizer: Any) -> None:
        self._generator = generator
        self._tokenizer = tokenizer
        self.name = generator.name

    @property
    def tokens_written(self) -> int:
        """By all calls of `sample`."""
        return self._generator.tokens_written

    def fingerprint(self) -> dict[str, Any]:
        """That of the generator."""
        return self._generator.fingerprint()

    def sample(self, requests: Iterable[PromptRequest], sampling: SamplingParams) -> Iterator[Answer]:
        """Yield one answer for each number of each request; see `Generator`."""
        texts = (_Text(request.prompt, number) for request in requests for number in request.numbers)
        while going := list(itertools.islice(texts, _TOGETHER)):
            for turn in itertools.count():
                yield from self._write_a_sentence(going, turn, sampling)
                going = [text for text in going if not text.done]
                if not going:
                    break

    def _write_a_sentence(self, going: "list[_Text]", turn: int, sampling: SamplingParams) -> Iterator[Answer]:
        """Write the next sentence of each text; yield those that end with it."""
        # An id for every sentence, since a completion's seed is made of it.
        by_id = {f"{text.prompt.prompt_id}\n{text.number}\n{turn}": text for text in going}
        requests = (
            PromptRequest(replace(text.prompt, prompt_id=key, begun=tuple(text.read)), (0,))
            for key, text in by_id.items()
        )
        stop = () if turn == _MOST_SENTENCES else _SENTENCE_ENDS
        for answer in self._generator.sample(requests, replace(sampling, stop=stop)):
            text, found = by_id[answer.prompt_id], answer.result
            if isinstance(found, Failure):
                text.done = True
                yield Answer(text.prompt.prompt_id, text.number, found)
                continue
            ids = self._to_the_sentence_end(found)
            text.add(ids or found.token_ids, sampling.max_tokens)
            text.done = ids is None or len(text.written) == sampling.max_tokens
            if text.done:
                yield Answer(text.prompt.prompt_id, text.number, self._result(text, found, ids is None))
            else:
                told = f"<used_tokens={len(text.written)}>"
                text.read += self._tokenizer(told, add_special_tokens=False)["input_ids"]

    def _to_the_sentence_end(self, found: GeneratedText) -> list[int] | None:
        """Ids without what stands behind the end of the sentence; None where it was the end of all."""
        ids = found.token_ids
        last = self._tokenizer.decode(ids[-1:])
        if found.finish_reason == "length" or last != self._tokenizer.decode(ids[-1:], skip_special_tokens=True):
            return None
        # The blank behind a full stop begins the next word, which will be written again.
        return ids[:-1] if len(ids) > 1 and last.strip() and last[:1].isspace() else ids

    def _result(self, text: "_Text", found: GeneratedText, ended: bool) -> GeneratedText:
        whole = ended and found.finish_reason == "stop" and not text.truncated
        return GeneratedText(
            self._tokenizer.decode(text.written, skip_special_tokens=True),
            text.written,
            "stop" if whole else "length",
            None,
            found.seed,
        )


class _Text:
    """A completion on its way: what was written, and what is read before the next sentence, the told among it."""

    def __init__(self, prompt: Prompt, number: int) -> None:
        self.prompt, self.number = prompt, number
        self.written: list[int] = []
        self.read: list[int] = []
        self.truncated = self.done = False

    def add(self, ids: list[int], limit: int) -> None:
        """Take a sentence in, as far as there is room."""
        kept = ids[: limit - len(self.written)]
        self.truncated = len(kept) < len(ids)
        self.written += kept
        self.read += kept
