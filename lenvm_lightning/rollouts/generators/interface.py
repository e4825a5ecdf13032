"""What a generator is asked and what it answers: prompts, sampling settings, completions."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from PIL import Image

from ...decoding.sampling_params import SamplingParams

if TYPE_CHECKING:
    from ...guidance import Control


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        prompt_id: unique among all prompts of a run, the same in every run.
        messages: chat messages, roles system / user / assistant; ``<image>`` in a content marks an image.
        images: pictures in the order of their marks, opened or as paths.
        split: ``train`` or ``test``; None where the source does not say.
        meta: what the record should remember, such as the gold answer; JSON values only.
    """

    prompt_id: str
    messages: list[dict[str, str]]
    images: tuple[Image.Image | str, ...] = ()
    split: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PromptRequest:
    """Completions wanted of one prompt: those of these ``numbers`` (each from 0 to n - 1).

    A ``control`` of their length is for generators with a length value model beside them.
    """

    prompt: Prompt
    numbers: tuple[int, ...]
    control: "Control | None" = None


@dataclass(frozen=True)
class GeneratedText:
    """One completion.

    Attributes:
        text: what was written, without special tokens.
        token_ids: generated ids, EOS included where it was generated.
        finish_reason: ``stop`` = ended by itself, ``length`` = cut at ``max_tokens``.
        logprob: sum over ``token_ids`` of the log-probability (nats) that the model gave them, before temperature and
            truncation; None where it is not known.
        seed: what this completion was drawn with.
        reencoded: True = the ids come from tokenising the text, not from the generator.
    """

    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length"]
    logprob: float | None
    seed: int
    reencoded: bool = False


@dataclass(frozen=True)
class Failure:
    """Why there is no completion; ``final`` = asking again would not help (a prompt too long, a picture refused)."""

    reason: str
    final: bool


@dataclass(frozen=True)
class Answer:
    """GeneratedText ``number`` of prompt ``prompt_id``, or why there is none."""

    prompt_id: str
    number: int
    result: GeneratedText | Failure


class Generator(Protocol):
    """A model that answers prompts: local (``rollouts.local``) or behind a server (``rollouts.server``)."""

    name: str
    """Written into every record."""

    def fingerprint(self) -> dict[str, Any]:
        """Return what identifies the model, as JSON values: the same wherever and whenever it is loaded."""

    def sample(self, requests: Iterable[PromptRequest], sampling: SamplingParams) -> Iterator[Answer]:
        """Yield one answer for each number of each request, as soon as it is there, in any order.

        One prompt that fails does not stop the others; what stops all of them is raised as a ``GeneratorError``.
        """
