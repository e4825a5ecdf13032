"""Samples of an evaluation: asked for, judged, and kept in a file that survives being killed at any moment."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, StrictBool, StrictFloat, StrictInt, StrictStr, TypeAdapter, ValidationError

from ..decoding.sampling_params import SamplingParams
from ..rollouts.ask import ask_for_missing
from ..rollouts.completion_store import CompletionStore
from ..rollouts.generators.interface import Answer, Failure, GeneratedText, Generator, Prompt, PromptRequest
from ..rollouts.record import require_sound
from ..utils.progress import CompletionProgress
from .rivals import Rival

if TYPE_CHECKING:
    from ..guidance import Control

Judge = Callable[[Mapping[str, Any], GeneratedText], dict[str, Any]]
"""(meta of the prompt, completion) -> what is to be remembered of the completion, JSON values."""
SampleKey = tuple[str, str, int]
"""(system, prompt_id, number)"""


@dataclass(frozen=True)
class System:
    """A way of answering that is measured.

    Attributes:
        name: as people type it.
        control: of a completion's length, by the meta of its prompt; None for the unguided generator.
        sampling: settings of sampling in which it differs.
        rival: what it does instead of a control; None for others.
    """

    name: str
    control: "Callable[[Mapping[str, Any]], Control | None] | None" = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    rival: Rival | None = None

    @property
    def guided(self) -> bool:
        """Whether it needs a length value model."""
        return self.control is not None


@dataclass(frozen=True)
class Sample:
    """A judged completion: a line of ``samples.jsonl``.

    Attributes:
        system: its name.
        prompt_id: of the question.
        number: which of its completions.
        tokens: generated, the end token included.
        finish_reason: ``stop`` or ``length`` (truncated).
        logprob: sum of the log-probabilities (nats) that the generator gave the tokens before temperature, truncation
            and control; None where it is not known.
        found: what judging found.
        text: what was written.
        token_ids: generated.
        reencoded: True = a server gave text only, and the ids come from encoding it again.
        seedless: True = it was sampled without a seed, and cannot be sampled a second time.
    """

    system: StrictStr
    prompt_id: StrictStr
    number: StrictInt
    tokens: StrictInt
    finish_reason: Literal["stop", "length"]
    logprob: StrictFloat | None
    found: dict[str, Any]
    text: StrictStr
    token_ids: list[StrictInt]
    reencoded: StrictBool = False
    seedless: StrictBool = False
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(allow_inf_nan=False, extra="forbid")

    @property
    def truncated(self) -> bool:
        """Whether it reached the token limit."""
        return self.finish_reason == "length"

    @property
    def key(self) -> SampleKey:
        """What tells it from all others of its folder."""
        return self.system, self.prompt_id, self.number

    @property
    def called(self) -> str:
        """For messages."""
        return _called(self.key)

    def as_line(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    @classmethod
    def from_line(cls, line: dict[str, Any]) -> Self:
        """Read it back.

        Raises:
            ValueError: it is not a whole sample; the text names the first thing that is wrong.
        """
        try:
            sample: Any = _SAMPLE.validate_python(line)
            require_sound(sample.text, sample.token_ids, sample.logprob)
            return sample
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error


_SAMPLE = TypeAdapter(Sample)


def _called(key: SampleKey) -> str:
    system, prompt_id, number = key
    return f"completion {number} of prompt {prompt_id!r} by {system}"


class SampleFolder(CompletionStore[SampleKey, Sample]):
    """A folder with ``settings.json``, ``samples.jsonl`` (one line a sample) and the results. A context manager.

    Args:
        folder: made where it is missing.
        settings: all that decides what is measured, JSON values.

    Attributes:
        samples: all that are there, by (system, prompt_id, number).
        failures: why others are not.
        notes: what was put right on opening, for people.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        super().__init__(folder, settings, Sample, file="samples.jsonl")
        self.samples: dict[SampleKey, Sample] = {}

    def forget(self) -> None:
        """Forget all samples."""
        self.samples.clear()

    def remember(self, record: Sample) -> None:
        """Keep a sample that is there."""
        self.samples[record.key] = record

    def of(self, system: str) -> list[Sample]:
        """Its samples, in the order of (prompt_id, number): not in that in which they came."""
        return [self.samples[key] for key in sorted(self.samples) if key[0] == system]


def by_question(samples: Iterable[Sample], value: Callable[[Sample], float]) -> dict[str, list[float]]:
    """Values of samples, those of a question together."""
    groups: dict[str, list[float]] = {}
    for sample in samples:
        groups.setdefault(sample.prompt_id, []).append(value(sample))
    return groups


def logprob_per_token(samples: Sequence[Sample]) -> float | None:
    """Nats a token that the generator gave the texts, before any control; None where it is not known of all."""
    total = sum(sample.tokens for sample in samples)
    known = [sample.logprob for sample in samples if sample.logprob is not None]
    return sum(known) / total if total and len(known) == len(samples) else None


def repetition(token_ids: Sequence[int], size: int = 4) -> float:
    """Share of the runs of ``size`` tokens in a text that stood in it before: 0 = none; 0 for a text without any."""
    runs = [tuple(token_ids[start : start + size]) for start in range(len(token_ids) - size + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def collect(
    folder: SampleFolder,
    generator: Generator,
    system: System,
    prompts: Sequence[Prompt],
    n: int,
    sampling: SamplingParams,
    judge: Judge,
) -> float | None:
    """Sample and judge what a system has not answered yet.

    Args:
        folder: where samples go; completions that cannot be had go to its ``failures``.
        generator: who is asked; with a length value model where the system is guided.
        system: how.
        prompts: the questions.
        n: completions of each.
        sampling: how tokens are sampled, what the system changes apart.
        judge: what is to be remembered of each completion.

    Returns:
        Tokens a second; None where all was there.

    Raises:
        GeneratorError: the generator stopped. What is done stays, and the next call goes on from there.
        StoreError: the folder cannot be written.
    """
    there = folder.of(system.name)
    for key in [key for key in folder.failures if key[0] == system.name]:
        del folder.failures[key]  # tried again
    missing = n * len(prompts) - len(there)
    if not missing:
        return None
    sampling = replace(sampling, **system.sampling)
    metas: dict[str, Mapping[str, Any]] = {}

    def keep(answer: Answer) -> None:
        key = (system.name, answer.prompt_id, answer.number)
        folder.require_missing(key, _called(key))
        if isinstance(answer.result, Failure):
            folder.add_failure(key, _called(key), answer.result)
        else:
            found = system.rival.read(answer.result) if system.rival else answer.result
            folder.add(_sample(key, found, judge(metas[answer.prompt_id], found)))

    progress = CompletionProgress(
        system.name,
        n * len(prompts),
        lambda: generator.tokens_written,
        sampling.max_tokens,
        there=len(there),
        tokens_there=sum(sample.tokens for sample in there),
        truncated=sum(sample.truncated for sample in there),
    )
    requests = _missing(folder, system, prompts, n, metas)
    return ask_for_missing(generator, requests, sampling, missing=missing, keep=keep, progress=progress, store=folder)


def _missing(
    folder: SampleFolder, system: System, prompts: Sequence[Prompt], n: int, metas: dict[str, Mapping[str, Any]]
) -> Iterator[PromptRequest]:
    """Requests for what is not there; fills ``metas`` on the way."""
    for prompt in prompts:
        numbers = tuple(k for k in range(n) if not folder.has((system.name, prompt.prompt_id, k)))
        if numbers:
            metas[prompt.prompt_id] = prompt.meta
            asked = system.rival.prompt(prompt) if system.rival else prompt
            yield PromptRequest(asked, numbers, system.control(prompt.meta) if system.control else None)


def _sample(key: SampleKey, completion: GeneratedText, found: dict[str, Any]) -> Sample:
    # Rounded, since a batch of another size may round otherwise, and after a kill batches are others.
    logprob = None if completion.logprob is None else round(completion.logprob, 3)
    return Sample(
        *key,
        tokens=len(completion.token_ids),
        finish_reason=completion.finish_reason,
        logprob=logprob,
        found=found,
        text=completion.text,
        token_ids=completion.token_ids,
        reencoded=completion.reencoded,
        seedless=completion.seed is None,
    )
