"""What clients send, as far as it is understood here: typed, bounded, and refused in a sentence.

Fields that change an answer and mean nothing here are refused; fields that do not (`user`, `metadata`, …) are ignored.
"""

import base64
import binascii
import random
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictInt, model_validator

from ..decoding.control_text import parse_control
from ..decoding.custom_params import read_custom_params
from ..decoding.sampling_params import GUIDED_SAMPLING, SamplingParams
from ..errors import GenerationError
from ..guidance import Control
from ..rollouts.record import IMAGE_MARK

_LONGEST_STOP, _MOST_STOPS = 200, 16
_LONGEST_CONTROL = 200
_SHORT = 16  # tokens
_MOST_LIKELIEST = 20  # tokens told for each place
_MOST_PROMPTS, _MOST_IDS, _MOST_MESSAGES, _MOST_PARTS = 1024, 2**17, 1024, 64
# Of the protocol, without a meaning here unless they are as they would be if left out.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "best_of": (1,),
    "suffix": ("",),
    "tools": ([],),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "guided_json": (),
    "guided_regex": (),
    "modalities": (["text"],),
    "audio": (),
    "prompt_logprobs": (0,),
}

Stop = Annotated[str, Field(min_length=1, max_length=_LONGEST_STOP)]
MaxTokens = Annotated[int, Field(ge=1)]


def _whole(text: str) -> str:
    """A text without half characters, which no tokenizer reads.

    Raises:
        ValueError: it holds one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("it holds half of a character (a lone surrogate)") from error
    return text


Text = Annotated[str, AfterValidator(_whole)]


class StreamOptions(BaseModel):
    """How to stream."""

    include_usage: bool = False


class GenerationRequest(BaseModel):
    """What both endpoints take."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    n: int | None = Field(None, ge=1)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = Field(None, ge=0, lt=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    priority: StrictInt | None = Field(None, ge=-(2**31), lt=2**31)
    return_token_ids: bool | None = False
    include_stop_str_in_output: bool | None = False
    stop: Stop | Annotated[list[Stop], Field(max_length=_MOST_STOPS)] | None = None
    lenvm: str | None = Field(None, max_length=_LONGEST_CONTROL)
    vllm_xargs: dict[str, Any] | None = None
    custom_params: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _no_meaning(self) -> "GenerationRequest":
        given = self.model_extra or {}
        wrong = [
            name for name, neutral in _NEUTRAL.items() if given.get(name) is not None and given[name] not in neutral
        ]
        if wrong:
            raise ValueError(f"{', '.join(wrong)}: this server does not do that; leave it out")
        return self

    def control(self) -> Control | None:
        """The control of the length that was asked for: as text, or in the words of the research code's server.

        Raises:
            ValueError: it means nothing, or there are several.
        """
        in_xargs = (self.vllm_xargs or {}).get("lenvm")
        given = {"lenvm": self.lenvm, "vllm_xargs.lenvm": in_xargs, "custom_params": self.custom_params or None}
        given = {name: one for name, one in given.items() if one is not None}
        if len(set(map(repr, given.values()))) > 1:
            told = " and ".join(f"{name} is {one!r}" for name, one in given.items())
            raise ValueError(f"{told}: give one of them")
        text = self.lenvm if self.lenvm is not None else in_xargs
        if text is not None and (not isinstance(text, str) or len(text) > _LONGEST_CONTROL):
            raise ValueError("vllm_xargs.lenvm must be a text such as 'equal-to:128'")
        try:
            if self.custom_params:
                return read_custom_params(self.custom_params)
            return None if text is None else parse_control(text)
        except GenerationError as error:
            raise ValueError(str(error)) from error

    def sampling(self, max_tokens: int, guided: bool) -> SamplingParams:
        """How tokens are sampled: guided as `lenvm generate` does where nobody says, unguided as the protocol does."""
        usual = GUIDED_SAMPLING if guided else SamplingParams()
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return SamplingParams(
            temperature=usual.temperature if self.temperature is None else self.temperature,
            top_p=usual.top_p if self.top_p is None else self.top_p,
            top_k=usual.top_k if self.top_k is None else max(self.top_k, 0),  # vLLM says -1 for all
            min_p=usual.min_p if self.min_p is None else self.min_p,
            max_tokens=max_tokens,
            seed=random.getrandbits(31) if self.seed is None else self.seed,
            stop=stop,
        )


class TextPart(BaseModel):
    """A piece of text in a message."""

    type: Literal["text"]
    text: Text


class ImageAddress(BaseModel):
    """Where an image is."""

    url: str


class ImagePart(BaseModel):
    """An image in a message."""

    type: Literal["image_url"]
    image_url: ImageAddress


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(BaseModel):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Part], Field(fail_fast=True, max_length=_MOST_PARTS)]

    def read(self, images: list[bytes]) -> dict[str, str]:
        """The message as everything here takes it; its images are appended to ``images``.

        Raises:
            ValueError: an image that does not come with the request.
        """
        role = "system" if self.role == "developer" else self.role
        if isinstance(self.content, str):
            if IMAGE_MARK in self.content:
                raise ValueError(f"{IMAGE_MARK} stands for an image: send that as a part of type image_url")
            return {"role": role, "content": self.content}
        texts = []
        for part in self.content:
            if isinstance(part, TextPart):
                texts.append(part.text.replace(IMAGE_MARK, "<image >"))
            else:
                images.append(_image_of(part.image_url.url))
                texts.append(IMAGE_MARK)
        return {"role": role, "content": "".join(texts)}


class ChatRequest(GenerationRequest):
    """The body of ``/v1/chat/completions``."""

    messages: list[Message] = Field(fail_fast=True, min_length=1, max_length=_MOST_MESSAGES)
    max_tokens: MaxTokens | None = None
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=_MOST_LIKELIEST)

    @model_validator(mode="after")
    def _together(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs is told beside logprobs: true")
        return self

    @property
    def most_tokens(self) -> int | None:
        """Limit of a completion; None where nobody says."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


TokenIds = Annotated[
    list[Annotated[int, Field(ge=0, lt=2**31)]], Field(fail_fast=True, min_length=1, max_length=_MOST_IDS)
]
ListsOfIds = Annotated[list[TokenIds], Field(fail_fast=True, min_length=1, max_length=_MOST_PROMPTS)]
Texts = Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=_MOST_PROMPTS)]


class CompletionRequest(GenerationRequest):
    """The body of ``/v1/completions``."""

    prompt: Text | TokenIds | Texts | ListsOfIds
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: int | None = Field(None, ge=0, le=_MOST_LIKELIEST)
    echo: bool | None = False

    @property
    def most_tokens(self) -> int | None:
        """Limit of a completion: 16, as in the protocol, where nobody says; None beside a control."""
        if self.max_tokens is None and self.control() is None:
            return _SHORT
        return self.max_tokens

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one by one."""
        given: Any = self.prompt
        return [given] if isinstance(given, str) or isinstance(given[0], int) else given


_MOST_LEVELS = 16
Level = Annotated[float, Field(gt=0.0, lt=1.0, allow_inf_nan=False)]


class LengthsRequest(BaseModel):
    """The body of ``/v1/lengths``: prompts, or one prompt and the answer to be read beside it."""

    messages: list[Message] | None = Field(None, fail_fast=True, max_length=_MOST_MESSAGES)
    prompts: Texts | None = None
    completion: Text | None = None
    quantiles: list[Level] = Field([0.05, 0.5, 0.95], max_length=_MOST_LEVELS)

    @model_validator(mode="after")
    def _one_way(self) -> "LengthsRequest":
        if (self.messages is None) == (self.prompts is None):
            raise ValueError("give messages of one chat, or prompts, a list of questions")
        if self.completion is not None and self.messages is None and len(self.prompts or ()) != 1:
            raise ValueError("completion is read beside one prompt")
        return self


def _image_of(url: str) -> bytes:
    """Content of a ``data:`` URL.

    Raises:
        ValueError: another kind of URL: nothing is fetched, or a client could make the server ask for anything.
    """
    head, _, content = url.partition(",")
    if not head.startswith("data:image/") or not head.endswith(";base64"):
        raise ValueError("image_url.url must be data:image/…;base64,…: this server fetches nothing from elsewhere")
    try:
        return base64.b64decode(content, validate=True)
    except binascii.Error as error:
        raise ValueError(f"image_url.url is not base64: {error}") from error
