"""A server's response as a completion: token ids where the server gives them, else made from the text and marked so."""

import logging
from typing import Any

from ....decoding.sampling_params import SamplingParams
from ....errors import GeneratorError
from ..interface import Failure, GeneratedText
from .encoding import TextEncoding

_log = logging.getLogger(__name__)
_ID_PREFIX = "token_id:"


class UnusableResponse(Exception):
    """A response without a completion, though nothing says that there cannot be one: the next one may hold it."""


class ResponseReader:
    """Makes completions of responses to chat completion requests.

    Args:
        sampling: of the run.
        encoding: makes ids from a text; None where there is no tokenizer.
    """

    def __init__(self, sampling: SamplingParams, encoding: TextEncoding | None) -> None:
        self._max_tokens, self._stop, self._encoding = sampling.max_tokens, sampling.stop, encoding
        self._reencoded = self._different = self._surplus = 0

    def read(self, response: Any, seed: int) -> GeneratedText | Failure:
        """Read one response to a request with this seed.

        Raises:
            UnusableResponse: it holds no completion, though nothing says that there cannot be one.
            GeneratorError: it has text only, and there is no tokenizer to make ids with.
        """
        choices = getattr(response, "choices", None)
        if not choices or getattr(choices[0], "message", None) is None:
            raise UnusableResponse(f"the server's answer holds no completion: {str(response)[:200]!r}")
        choice, reason = choices[0], choices[0].finish_reason
        if reason in (None, "abort", "error"):
            raise UnusableResponse(f"the server gave the completion up (finish_reason {reason})")
        if reason not in ("stop", "length"):
            return Failure(
                f"the completion neither ended nor was truncated, but finish_reason is {reason!r}", final=True
            )
        counted = getattr(response.usage, "completion_tokens", None)
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
            ids = self._make_ids(text, reason == "stop" and not self._stop_text_ended(choice, text), counted)
            if not ids:
                return Failure("there is no text to make tokens of", final=True)
        logprob = sum(step.logprob for step in steps) if steps and len(steps) == len(ids) else None
        return GeneratedText(text, ids, reason, logprob, seed, reencoded)

    def _stop_text_ended(self, choice: Any, text: str) -> bool:
        """Whether a stop text ended it, and no end token; servers that take the text out and say nothing hide it."""
        extra = choice.model_extra or {}
        named = extra.get("stop_reason", extra.get("matched_stop"))  # vLLM's name, SGLang's; ids are end tokens
        # The token that completes a stop text may go on behind it, so the text need not end there.
        return isinstance(named, str) or any(stop in text for stop in self._stop)

    def _make_ids(self, text: str, ended: bool, counted: int | None) -> list[int]:
        if self._encoding is None:
            raise GeneratorError(
                "the server sends text without token ids, and there is no tokenizer to make them with: give the "
                "model's own as processor (a directory or a Hugging Face id)."
            )
        ids = self._encoding.encode(text) + ([self._encoding.eos] if ended else [])
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
