"""What a generator is asked and what it answers: prompts and sampling parameters in, completions or failures out."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

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
        images: in the order of their marks: opened, as paths, or as the bytes of a file.
        split: ``train`` or ``test``; None where the source does not say.
        meta: what the record should remember, such as the gold answer; JSON values only.
        begun: ids that the answer begins with, read and not written; a generator in this process takes them.
    """

    prompt_id: str
    messages: list[dict[str, str]]
    images: tuple[Image.Image | str | bytes, ...] = ()
    split: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    begun: tuple[int, ...] = ()


@dataclass(frozen=True)
class PromptRequest:
    """Completions wanted of one prompt.

    Attributes:
        prompt: what is asked.
        numbers: which of its n completions, each from 0 to n - 1; those that an earlier run got are left out.
        control: of their length, for generators with a length value model beside them; None: the model alone.
        limit: tokens after which a completion may be truncated, though ``max_tokens`` are more; it may fall while one
            is written. A generator that is `Stoppable` looks at it, to others it means nothing.
    """

    prompt: Prompt
    numbers: tuple[int, ...]
    control: "Control | None" = None
    limit: Callable[[], int] | None = None

    def failures(self, reason: str) -> "Iterator[Answer]":
        """Answers that none of its completions can be had, for good."""
        for number in self.numbers:
            yield Answer(self.prompt.prompt_id, number, Failure(reason, final=True))


@dataclass(frozen=True)
class GeneratedText:
    """One completion.

    Attributes:
        text: what was written, without special tokens.
        token_ids: generated ids, EOS included where it was generated.
        finish_reason: ``stop`` = ended by itself or with a stop text, ``length`` = truncated at ``max_tokens``.
        logprob: sum over ``token_ids`` of the log-probability (nats) that the model gave them, before temperature and
            truncation; None where it is not known.
        seed: what this completion was sampled with; None = nobody can sample it a second time.
        reencoded: True = the ids come from tokenising the text, not from the generator.
    """

    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length"]
    logprob: float | None
    seed: int | None
    reencoded: bool = False


@dataclass(frozen=True)
class Failure:
    """Why there is no completion.

    Attributes:
        reason: for people.
        final: True = asking again would not help, such as with a prompt that is too long or an image that is refused.
    """

    reason: str
    final: bool


@dataclass(frozen=True)
class Answer:
    """What became of one completion that was asked for.

    Attributes:
        prompt_id: of its prompt.
        number: which completion of that prompt, from 0 to n - 1.
        result: the completion, or why there is none.
    """

    prompt_id: str
    number: int
    result: GeneratedText | Failure


class Prompts(Protocol):
    """Prompts of a run, as `load_prompts` returns them: an image is opened or drawn when its prompt is taken."""

    ids: list[str]
    """The ``prompt_id`` of each, in order; all different."""
    description: dict[str, Any]
    """Where they come from, with a digest of their content, as JSON values."""

    def __len__(self) -> int:
        """Return how many there are."""

    def __getitem__(self, index: int, /) -> Prompt:
        """Return one of them."""


class Generator(Protocol):
    """A model that answers prompts, in this process (`LocalGenerator`) or behind an address (`ServerGenerator`)."""

    name: str
    """Written into every record."""

    @property
    def tokens_written(self) -> int:
        """Tokens written by all calls of `sample` together; it only grows.

        A generator that knows what its completions have while they are being written counts their tokens as they come,
        others count a completion when it is finished.
        """

    def fingerprint(self) -> dict[str, Any]:
        """Return what identifies the model, as JSON values: the same wherever and whenever it is loaded."""

    def sample(self, requests: Iterable[PromptRequest], sampling: SamplingParams) -> Iterator[Answer]:
        """Yield one answer for each number of each request, as soon as it is there, in any order.

        A completion depends on its prompt, ``sampling`` and its number, and not on what is asked for beside it. One
        prompt that fails does not stop the others: its answers are a `Failure`. Requests are taken one by one, as there
        is room for them. Closing the iterator abandons what is under way.

        Args:
            requests: which completions of which prompts; may be endless.
            sampling: how tokens are sampled, the same for all of them.

        Raises:
            GeneratorError: nothing more can be had from this generator.
            GenerationError: a request has a control that this generator cannot follow.
        """


@runtime_checkable
class Stoppable(Protocol):
    """A generator that truncates completions while it writes them, see `PromptRequest.limit`; soon, not at once."""

    def text_of(self, token_ids: list[int]) -> str:
        """Return the text of a completion that was truncated there, as `GeneratedText` has it."""
