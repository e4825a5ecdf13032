"""What clients get: completions put together from tokens, whole or in pieces, in the words of the OpenAI protocol."""

import itertools
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionTokenLogprob
from openai.types.chat.chat_completion import Choice, ChoiceLogprobs
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_token_logprob import TopLogprob
from openai.types.completion_choice import Logprobs

from ..decoding.read_back import ReadToken
from ..decoding.text_stream import HALF, TextStream
from .engine_loop import Job, WrittenToken


@dataclass(frozen=True)
class Wanted:
    """What an answer tells beside its text.

    Attributes:
        chat: True = in the words of ``/v1/chat/completions``.
        logprobs: True = log-probabilities of its tokens.
        likeliest: so many tokens that were likeliest in the place of each.
        echo: True = the prompt before it, with its log-probabilities.
        token_ids: True = ids of what was written.
        stop_text: True = the stop text that ended it stays.
    """

    chat: bool
    logprobs: bool = False
    likeliest: int = 0
    echo: bool = False
    token_ids: bool = False
    stop_text: bool = False

    @property
    def from_reading(self) -> bool:
        """Whether the text has to be read for that once it is written."""
        return self.logprobs and (self.echo or self.likeliest > 0)


@dataclass
class Answer:
    """One completion as it grows.

    Attributes:
        index: among all of its request.
        prompt_ids: of its prompt.
        stream: its text.
        echoed: text of its prompt, where that is wanted.
        token_ids: written so far, the end token included.
        logprobs: (nats) of them, by the base model.
        expected: tokens expected before the first one; None without a length value model.
        remaining: still to come after the last one.
        finish_reason: None while it is being written.
        read: prompt and completion, read back; None where nobody did.
        told_ids: so many of its ids were told already.
    """

    index: int
    prompt_ids: list[int]
    stream: TextStream
    echoed: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    expected: float | None = None
    remaining: float | None = None
    finish_reason: str | None = None
    read: list[ReadToken] | None = None
    told_ids: int = 0

    def told_tokens(self, echo: bool) -> list[ReadToken]:
        """The tokens whose log-probabilities are told: its own, with ``echo`` those of the prompt before them."""
        if self.read is not None:
            return self.read[0 if echo else len(self.prompt_ids) :]
        return list(map(ReadToken, self.token_ids, self.logprobs))

    def take(self, token: WrittenToken) -> str:
        """Count a token in; returns what can be shown now."""
        self.expected = token.expected if self.expected is None else self.expected
        self.remaining, self.finish_reason = token.remaining, token.finish_reason
        if token.token_id >= 0:
            self.token_ids.append(token.token_id)
            self.logprobs.append(token.logprob)
        return self.stream.add(token.token_id, token.finish_reason is not None)

    def lengths(self) -> dict[str, float]:
        """What is known of its length: what was expected, and what is still to come; empty without a value model."""
        known = {"expected_tokens": self.expected, "remaining_tokens": self.remaining}
        return {name: round(number, 1) for name, number in known.items() if number is not None}


class Answers:
    """All completions of a request.

    Args:
        jobs: of its prompts.
        tokenizer: of their vocabulary.
        model: how the client knows the generator.
        wanted: what they tell.
        echoed: texts of the prompts, where they are wanted.
    """

    def __init__(self, jobs: list[Job], tokenizer: Any, model: str, wanted: Wanted, echoed: Sequence[str] = ()) -> None:
        self.wanted, self._model, self._tokenizer = wanted, model, tokenizer
        self._created = int(time.time())
        self.id = f"{'chatcmpl' if wanted.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._prompt_tokens = sum(len(job.prompt_ids) for job in jobs)
        self.by_job = []
        count = 0
        for number, job in enumerate(jobs):
            text = echoed[number] if echoed else ""
            streams = [TextStream(tokenizer, job.params.stop, keep=wanted.stop_text) for _ in job.seeds]
            self.by_job.append([Answer(count + k, job.prompt_ids, one, text) for k, one in enumerate(streams)])
            count += len(job.seeds)
        self.all = [answer for answers in self.by_job for answer in answers]

    def usage(self) -> CompletionUsage:
        """Tokens, and what was expected of all completions together, ``expected_completion_tokens``."""
        written = sum(len(answer.token_ids) for answer in self.all)
        expected = [answer.expected for answer in self.all if answer.expected is not None]
        extra: dict[str, Any] = {"expected_completion_tokens": round(sum(expected), 1)} if expected else {}
        return CompletionUsage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=written,
            total_tokens=self._prompt_tokens + written,
            **extra,
        )

    # -- whole ---

    def whole(self) -> dict[str, Any]:
        """The answer where nothing is streamed."""
        common: dict[str, Any] = {"id": self.id, "created": self._created, "model": self._model, "usage": self.usage()}
        if self.wanted.chat:
            choices = [self._chat_choice(answer) for answer in self.all]
            return ChatCompletion(object="chat.completion", choices=choices, **common).model_dump(exclude_none=True)
        texts = [self._text_choice(answer) for answer in self.all]
        whole = Completion.model_construct(object="text_completion", choices=texts, **common)
        return whole.model_dump(exclude_none=True)

    def _chat_choice(self, answer: Answer) -> Choice:
        given: dict[str, Any] = {"message": {"role": "assistant", "content": answer.stream.text}, **self._extra(answer)}
        known = ChoiceLogprobs(content=self._token_logprobs(answer)) if self.wanted.logprobs else None
        return Choice(index=answer.index, finish_reason=_reason(answer), logprobs=known, **given)

    def _text_choice(self, answer: Answer) -> CompletionChoice:
        known = self._flat_logprobs(answer) if self.wanted.logprobs else None
        reason, text = _reason(answer), answer.echoed + answer.stream.text
        # The type knows no place without a number, and the first token of a prompt has none.
        return CompletionChoice.model_construct(
            index=answer.index, finish_reason=reason, text=text, logprobs=known, **self._extra(answer)
        )

    def _token_logprobs(self, answer: Answer) -> list[ChatCompletionTokenLogprob]:
        told = []
        for one in answer.told_tokens(echo=False):
            best = [TopLogprob(**self._told(token, logprob)) for token, logprob in one.likeliest]
            told.append(ChatCompletionTokenLogprob(**self._told(one.token_id, one.logprob), top_logprobs=best))
        return told

    def _told(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        text = self._tokenizer.decode([token_id])
        # Half a character has bytes that no decoder tells.
        return {"token": text, "logprob": logprob, "bytes": None if HALF in text else list(text.encode())}

    def _flat_logprobs(self, answer: Answer) -> Logprobs:
        read = answer.told_tokens(self.wanted.echo)
        texts = [self._tokenizer.decode([one.token_id]) for one in read]
        tops: list[dict[str, float] | None] = []
        for text, one in zip(texts, read, strict=True):
            best = {self._tokenizer.decode([token]): logprob for token, logprob in reversed(one.likeliest)}
            tops.append(None if one.logprob is None else {text: one.logprob} | best)
        offsets = list(itertools.accumulate(map(len, texts[:-1]), initial=0)) if texts else []
        return Logprobs.model_construct(
            tokens=texts, token_logprobs=[one.logprob for one in read], top_logprobs=tops, text_offset=offsets
        )

    # -- in pieces ---

    def opening(self) -> Iterator[dict[str, Any]]:
        """What a chat begins with."""
        if self.wanted.chat:
            for answer in self.all:
                yield self._piece(answer, "", role="assistant")

    def piece(self, answer: Answer, shown: str) -> dict[str, Any] | None:
        """What a token has added; None where that is nothing yet."""
        return self._piece(answer, shown) if shown or answer.finish_reason else None

    def _piece(self, answer: Answer, shown: str, role: str | None = None) -> dict[str, Any]:
        reason = _reason(answer) if answer.finish_reason else None
        common: dict[str, Any] = {"id": self.id, "created": self._created, "model": self._model}
        if self.wanted.chat:
            delta: Any = {"content": shown} if role is None else {"role": role, "content": shown}
            choice = ChunkChoice(index=answer.index, delta=delta, finish_reason=reason, **self._extra(answer))
            chunk = ChatCompletionChunk(object="chat.completion.chunk", choices=[choice], **common)
            return chunk.model_dump(exclude_unset=True)
        text: Any = CompletionChoice.model_construct(
            index=answer.index, text=shown, finish_reason=reason, **self._extra(answer)
        )
        return Completion.model_construct(object="text_completion", choices=[text], **common).model_dump(
            exclude_unset=True
        )

    def _extra(self, answer: Answer) -> dict[str, Any]:
        """What this server tells beside the protocol; clients ignore fields they do not know."""
        known = answer.lengths()
        told: dict[str, Any] = {"lenvm": known} if known else {}
        if self.wanted.token_ids:
            ids = answer.token_ids
            told["token_ids"], answer.told_ids = ids[answer.told_ids :], len(ids)
        return told

    def closing(self) -> dict[str, Any]:
        """The piece with the usage, where the client asked for it."""
        common = {"id": self.id, "created": self._created, "model": self._model, "usage": self.usage().model_dump()}
        kind = "chat.completion.chunk" if self.wanted.chat else "text_completion"
        return {"object": kind, "choices": [], **common}


def _reason(answer: Answer) -> Any:
    """Why it ended; one of which nothing was to be written was truncated."""
    return "length" if answer.finish_reason in ("length", None) else "stop"
