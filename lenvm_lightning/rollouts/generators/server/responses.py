"""A server's response as a completion: token ids where the server gives them, else made from the text and marked so."""

import logging
import re
from typing import Literal

from ....decoding.sampling_params import SamplingParams
from ....errors import GeneratorError
from ....utils.foreign_text import as_shown
from ...record import MOST_TOKEN_ID
from ..interface import Failure, GeneratedText
from .encoding import TextEncoding
from .reply import Choice, Completion, Step, UnusableResponse, read_reply

_log = logging.getLogger(__name__)
_ID = re.compile(r"token_id:(\d{1,10})", re.ASCII)
_TEXT_ONLY = 4  # responses without ids, and none with them, before a server is believed to give none
_LONGEST_TOKEN = 256  # characters; runs of spaces or dashes
_SLACK = 2  # ids made from a text may be more than were generated, but not many times as many


class ResponseReader:
    """Makes completions of responses to chat completion requests.

    Args:
        sampling: of the run.
        encoding: makes ids from a text; None where there is no tokenizer.
    """

    def __init__(self, sampling: SamplingParams, encoding: TextEncoding | None) -> None:
        self._max_tokens, self._stop, self._encoding = sampling.max_tokens, sampling.stop, encoding
        self._reencoded = self._different = self._surplus = 0
        self._without_ids, self._any_ids = 0, False

    def read(self, content: bytes, seed: int | None) -> GeneratedText | Failure:
        """Read one response to a request with this seed.

        Args:
            content: of the response, as it came.
            seed: None where the request had none.

        Raises:
            UnusableResponse: it holds no completion, though nothing says that there cannot be one.
            GeneratorError: it has text only, as all before it, and there is no tokenizer to make ids with.
        """
        # 1. What it says of itself.
        reply = read_reply(Completion, content)
        choice = reply.choices[0]
        reason = choice.finish_reason
        if reason in (None, "abort", "error"):
            raise UnusableResponse(f"the server gave the completion up (finish_reason {reason})")
        if reason not in ("stop", "length"):
            return Failure(
                f"the completion neither ended nor was truncated, but finish_reason is '{as_shown(reason, 100)}'",
                final=True,
            )
        counted = reply.usage.completion_tokens if reply.usage else None
        if counted is not None and counted > self._max_tokens:
            return self._too_many(counted)

        # 2. Its text and its tokens.
        thoughts = choice.message.thoughts
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
        else:
            self._any_ids = True
            if len(ids) > self._max_tokens:
                return self._too_many(len(ids))
            self._require_known(ids)
        end: Literal["stop", "length"] = "length" if reason == "length" else "stop"
        logprob = sum(step.logprob for step in steps) if steps and len(steps) == len(ids) else None
        return GeneratedText(text, ids, end, logprob, seed, reencoded)

    def _too_many(self, count: int) -> Failure:
        told = as_shown(str(count), 20)
        return Failure(f"{told} tokens written, more than max_tokens {self._max_tokens}", final=True)

    def _require_known(self, ids: list[int]) -> None:
        """Refuse ids that the vocabulary does not have, where it is known.

        Raises:
            UnusableResponse: there is one.
        """
        if self._encoding is not None and max(ids) >= self._encoding.vocabulary:
            raise UnusableResponse(
                f"the server's answer holds the token id {max(ids)}, and the vocabulary of the tokenizer ends at "
                f"{self._encoding.vocabulary - 1}: it is another model's, or the answer is nonsense"
            )

    def _stop_text_ended(self, choice: Choice, text: str) -> bool:
        """Whether a stop text ended it, and no end token; servers that take the text out and say nothing hide it."""
        named = choice.stop_reason if "stop_reason" in choice.model_fields_set else choice.matched_stop
        # Ids are end tokens. The token that completes a stop text may go on behind it, so the text need not end there.
        return isinstance(named, str) or any(stop in text for stop in self._stop)

    def _make_ids(self, text: str, ended: bool, counted: int | None) -> list[int]:
        if self._encoding is None:
            self._without_ids += 1
            if self._any_ids or self._without_ids < _TEXT_ONLY:
                raise UnusableResponse("the server's answer holds no token ids, and there is no tokenizer to make them")
            raise GeneratorError(
                "the server sends text without token ids, and there is no tokenizer to make them with: give the "
                "model's own as processor (a directory or a Hugging Face id)."
            )
        if len(text) > _LONGEST_TOKEN * (self._max_tokens + 1):
            raise UnusableResponse(f"{len(text):,} characters are no text of {self._max_tokens} tokens")
        ids = self._encoding.encode(text) + ([self._encoding.eos] if ended else [])
        if len(ids) > _SLACK * self._max_tokens + 1:
            raise UnusableResponse(
                f"the tokenizer makes {len(ids):,} tokens of the text, and there can be {self._max_tokens} in it"
            )
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


def _given_ids(choice: Choice, steps: list[Step]) -> list[int] | None:
    """Generated ids: by themselves (vLLM, SGLang), beside log-probabilities (llama.cpp) or for a text (older vLLM).

    Raises:
        UnusableResponse: an id in the place of a text is none.
    """
    if choice.token_ids:
        return choice.token_ids
    beside = [step.id for step in steps if step.id is not None]
    if beside and len(beside) == len(steps):
        return beside
    if not steps or not all(step.token.startswith("token_id:") for step in steps):
        return None
    found = [_ID.fullmatch(step.token) for step in steps]
    ids = [int(one[1]) for one in found if one is not None]
    if len(ids) < len(steps) or max(ids) > MOST_TOKEN_ID:
        raise UnusableResponse("the server's answer writes token ids in the place of texts, and one of them is none")
    return ids
