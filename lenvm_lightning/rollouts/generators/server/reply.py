"""What servers send, typed: nothing of a reply is used that was not looked at.

The client's own types are no help here: it makes them of whatever came, unchecked, so that a text may be a list and a
count a word.
"""

from typing import Annotated, Any, TypeVar

import pydantic

from ....errors import LenVMError
from ....utils.json_input import parse_json
from ...record import MOST_TOKEN_ID

_SHOWN = 3  # problems of one reply in a message
_SMALLEST_LOGPROB = -1e6  # nats; OpenAI writes -9999 for "very unlikely"
_LARGEST_LOGPROB = 0.01  # nats; rounding may lift one above 0

TokenId = Annotated[int, pydantic.Field(ge=0, le=MOST_TOKEN_ID)]
LogProb = Annotated[float, pydantic.Field(ge=_SMALLEST_LOGPROB, le=_LARGEST_LOGPROB)]


class UnusableResponse(LenVMError):
    """A response without a completion, though nothing says that there cannot be one: the next one may hold it.

    Attributes:
        begin: how it begins, as it came; empty where that tells nothing.
    """

    def __init__(self, reason: str, begin: str = "") -> None:
        super().__init__(reason)
        self.begin = begin


class Reply(pydantic.BaseModel):
    """A reply or a part of one; fields that nobody asked for are passed over, words are no numbers."""

    model_config = pydantic.ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, hide_input_in_errors=True)


class Step(Reply):
    """A generated token, and its log-probability in nats; llama.cpp's server tells its id, too."""

    token: str = ""
    id: TokenId | None = None
    logprob: LogProb


class LogProbs(Reply):
    """Those of all tokens."""

    content: list[Step] | None = pydantic.Field(default=None, fail_fast=True)


class Message(Reply):
    """What was written; reasoning under the names that servers take it out with."""

    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None

    @property
    def thoughts(self) -> str:
        """The reasoning that the server took out of the text."""
        return self.reasoning or self.reasoning_content or ""


class Choice(Reply):
    """One completion. What ended it is ``stop_reason`` to vLLM, ``matched_stop`` to SGLang: a text, or an end token."""

    message: Message
    finish_reason: str | None = None
    logprobs: LogProbs | None = None
    token_ids: list[TokenId] | None = pydantic.Field(default=None, fail_fast=True)
    stop_reason: Any = None
    matched_stop: Any = None


class Usage(Reply):
    """How many tokens the server counted."""

    completion_tokens: Annotated[int, pydantic.Field(ge=0)] | None = None


class Completion(Reply):
    """The reply to a chat completion request."""

    choices: list[Choice] = pydantic.Field(min_length=1, fail_fast=True)
    usage: Usage | None = None


class Card(Reply):
    """A model that a server lists, and who it says it is."""

    id: str
    owned_by: str | None = None


class ModelList(Reply):
    """The models of a server."""

    data: list[Card] | None = pydantic.Field(default=None, fail_fast=True)


class Description(Reply):
    """What a FastAPI server says of itself: its paths."""

    paths: dict[str, Any]


Kind = TypeVar("Kind", bound=Reply)


def read_reply(kind: type[Kind], content: bytes) -> Kind:
    """Read the JSON of a reply.

    Args:
        kind: what it should be.
        content: as it came.

    Raises:
        UnusableResponse: it is something else; the text says where.
    """
    begin = content[:1000].decode("utf-8", "replace")
    try:
        return kind.model_validate(parse_json(content))
    except pydantic.ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        told = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in problems[:_SHOWN])
        if len(problems[0]["loc"]) > 1:
            begin = ""  # it is of the right kind, and begins otherwise each time
    except ValueError as error:
        told = str(error)
    raise UnusableResponse(f"the server's answer cannot be read: {told.removeprefix(': ')}", begin.strip())
