"""A server's reply as a completion: token ids where the server gives them, else made from the text and marked so."""

import logging
from collections.abc import Callable
from typing import Any

from ....errors import GeneratorError
from ..interface import Failure, GeneratedText

_log = logging.getLogger(__name__)
_ID_PREFIX = "token_id:"


class UnusableReply(Exception):
    """A reply that says nothing; the next one may."""


class Reader:
    """Reads replies to chat completion requests.

    Args:
        max_tokens: what completions were to be cut at, in tokens.
        encode: makes ids from a text; None where there is no tokenizer.
        eos: the id that ends a completion; None where there is no tokenizer.
    """

    def __init__(self, max_tokens: int, encode: Callable[[str], list[int]] | None, eos: int | None) -> None:
        self._max_tokens, self._encode, self._eos = max_tokens, encode, eos
        self._reencoded = self._different = self._surplus = 0

    def read(self, reply: Any, seed: int) -> GeneratedText | Failure:
        """Read one reply.

        Raises:
            UnusableReply: it holds no completion, though nothing says that there cannot be one.
            GeneratorError: it has text only, and there is no tokenizer to make ids with.
        """
        choices = getattr(reply, "choices", None)
        if not choices or getattr(choices[0], "message", None) is None:
            raise UnusableReply(f"the server's answer holds no completion: {str(reply)[:200]!r}")
        choice, reason = choices[0], choices[0].finish_reason
        if reason in (None, "abort", "error"):
            raise UnusableReply(f"the server gave the completion up (finish_reason {reason})")
        if reason not in ("stop", "length"):
            return Failure(f"the completion was neither ended nor cut, but finish_reason is {reason!r}", final=True)
        counted = getattr(reply.usage, "completion_tokens", None)
        if counted is not None and counted > self._max_tokens:
            return Failure(f"{counted} tokens written, more than max_tokens {self._max_tokens}", final=True)
        extra = choice.message.model_extra or {}
        thoughts = extra.get("reasoning") or extra.get("reasoning_content") or ""
        text = thoughts + (choice.message.content or "")
        steps = (choice.logprobs and choice.logprobs.content) or []
        ids = _given_ids(choice, steps)
        reencoded = ids is None
        if ids is None:
            if thoughts:
                return Failure(
                    "the server takes the reasoning out of the text, so its tokens cannot be counted: start it "
                    "without a reasoning parser",
                    final=True,
                )
            ids = self._make_ids(text, reason == "stop", counted)
            if not ids:
                return Failure("cut, and there is no text to make tokens of", final=True)
        logprob = sum(step.logprob for step in steps) if steps and len(steps) == len(ids) else None
        return GeneratedText(text, ids, reason, logprob, seed, reencoded)

    def _make_ids(self, text: str, ended: bool, counted: int | None) -> list[int]:
        if self._encode is None or self._eos is None:
            raise GeneratorError(
                "the server sends text without token ids, and there is no tokenizer to make them with: give the "
                "model's own as processor (a directory or a Hugging Face id)."
            )
        ids = self._encode(text) + ([self._eos] if ended else [])
        self._reencoded += 1
        if counted is not None and counted != len(ids):
            self._different += 1
            self._surplus += len(ids) - counted
        return ids

    def report(self) -> None:
        """Say once how often the ids made from text are more or fewer than the server had generated."""
        if self._different:
            _log.warning(
                "The server returned text only. Tokens made again from the text differ in number from those it had "
                "generated in %d of %d completions (by %+.1f on average), and so do lengths learned from them.",
                self._different,
                self._reencoded,
                self._surplus / self._different,
            )


def _given_ids(choice: Any, steps: list[Any]) -> list[int] | None:
    """Generated ids as vLLM and SGLang give them, or as older vLLM writes them in the place of its tokens' text."""
    ids = (choice.model_extra or {}).get("token_ids")
    if isinstance(ids, list) and ids and all(type(i) is int for i in ids):
        return ids
    if steps and all(step.token.startswith(_ID_PREFIX) for step in steps):
        return [int(step.token.removeprefix(_ID_PREFIX)) for step in steps]
    return None
