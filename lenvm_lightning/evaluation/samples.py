"""Samples of an evaluation: asked for, judged, and kept in a file that survives being killed at any moment."""

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Generator as PythonGenerator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ..decoding.sampling_params import SamplingParams
from ..errors import EvaluationError, GeneratorError
from ..rollouts.generators.interface import Failure, GeneratedText, Generator, Prompt, PromptRequest
from ..rollouts.journal import Journal
from ..utils.locked_folder import FolderLock, differences, write_whole

if TYPE_CHECKING:
    from ..guidance import Control

Judge = Callable[[Mapping[str, Any], GeneratedText], dict[str, Any]]
"""(meta of the prompt, completion) -> what is to be remembered of the completion, JSON values."""
_TELL_SECONDS = 20.0


@dataclass(frozen=True)
class System:
    """A way of answering that is measured.

    Attributes:
        name: as people type it.
        control: of a completion's length, by the meta of its prompt; None for the unguided generator.
        sampling: settings of sampling in which it differs.
    """

    name: str
    control: "Callable[[Mapping[str, Any]], Control | None] | None" = None
    sampling: Mapping[str, Any] = field(default_factory=dict)

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
    """

    system: str
    prompt_id: str
    number: int
    tokens: int
    finish_reason: str
    logprob: float | None
    found: dict[str, Any]
    text: str
    token_ids: list[int]
    reencoded: bool = False

    @property
    def truncated(self) -> bool:
        """Whether it reached the token limit."""
        return self.finish_reason == "length"


class SampleFolder:
    """A folder with ``settings.json``, ``samples.jsonl`` (one line a sample) and the results. A context manager.

    Args:
        path: the folder; made where it is missing.
        settings: all that decides what is measured, JSON values.

    Attributes:
        samples: all that are there, by (system, prompt_id, number).
        failed: why others are not.
        notes: what was put right on opening, for people.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.samples: dict[tuple[str, str, int], Sample] = {}
        self.failed: dict[tuple[str, str, int], str] = {}
        self.notes: list[str] = []
        self._settings = json.loads(json.dumps(settings))
        self._journal = Journal(path / "samples.jsonl", path / "broken.jsonl")
        self._lock = FolderLock(path)

    def __enter__(self) -> "SampleFolder":
        """Lock it, compare settings, repair and read what is there.

        Raises:
            StoreError: in use, or not to be written.
            EvaluationError: it holds samples of other settings.
        """
        self._lock.__enter__()
        try:
            self._check_settings()
            self.notes = self._journal.read(self._take)
        except BaseException:
            self._lock.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Force everything to the disk and let others in."""
        try:
            self._journal.sync()
        finally:
            self._journal.close()
            self._lock.__exit__(None, None, None)

    def _check_settings(self) -> None:
        file = self.path / "settings.json"
        there = self._journal.path.exists() and self._journal.path.stat().st_size > 0
        try:
            old = json.loads(file.read_text(encoding="utf-8"))
            changed = differences(old, self._settings)
        except FileNotFoundError:
            changed = ["settings.json is missing"]
        except (ValueError, AttributeError) as error:
            changed = [f"settings.json cannot be read: {error}"]
        if changed and there:
            raise EvaluationError(
                f"{self.path} holds samples of other settings:\n  " + "\n  ".join(changed) + "\n"
                "Choose another --out, or delete that folder."
            )
        if changed:
            write_whole(file, json.dumps(self._settings, indent=2) + "\n")

    def _take(self, line: bytes, place: int) -> str:
        if place == 0:
            self.samples.clear()
        try:
            sample = Sample(**json.loads(line))
        except (ValueError, TypeError) as error:
            return f"not a whole sample ({error})"
        self.samples[sample.system, sample.prompt_id, sample.number] = sample
        return ""

    def add(self, sample: Sample) -> None:
        """Write a sample down.

        Raises:
            EvaluationError: the disk is full. What was there before is still there, whole.
        """
        try:
            self._journal.append(json.dumps(asdict(sample)).encode())
        except OSError as error:
            raise EvaluationError(
                f"{self.path} cannot be written: {error.strerror}. {len(self.samples):,} samples are there and stay: "
                "make room, then type the same command again."
            ) from error
        self.samples[sample.system, sample.prompt_id, sample.number] = sample

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
        folder: where samples go; completions that cannot be had go to its ``failed``.
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
    """
    own = replace(sampling, **system.sampling)
    metas: dict[str, Mapping[str, Any]] = {}
    missing = n * len(prompts) - sum(key[0] == system.name for key in folder.samples)
    if not missing:
        return None
    requests = _missing(folder, system, prompts, n, metas)
    answered = tokens = 0
    began = time.monotonic()
    answers = generator.sample(requests, own)
    with _Progress(system.name, n * len(prompts), missing) as progress:
        try:
            for answer in answers:
                answered += 1
                key = (system.name, answer.prompt_id, answer.number)
                if isinstance(answer.result, Failure):
                    folder.failed[key] = answer.result.reason
                else:
                    folder.add(_sample(key, answer.result, judge(metas[answer.prompt_id], answer.result)))
                    tokens += len(answer.result.token_ids)
                progress.add(tokens / (time.monotonic() - began))
            if answered < missing:
                raise GeneratorError(f"{generator.name} stopped {missing - answered:,} answers short, silently.")
        except GeneratorError as error:
            raise GeneratorError(
                f"{error}\n{len(folder.samples):,} samples are in {folder.path} and stay; the same command goes on "
                "from there."
            ) from error
        finally:
            if isinstance(answers, PythonGenerator):
                answers.close()  # requests under way are abandoned
    return tokens / max(1e-9, time.monotonic() - began)


def _missing(
    folder: SampleFolder, system: System, prompts: Sequence[Prompt], n: int, metas: dict[str, Mapping[str, Any]]
) -> Iterator[PromptRequest]:
    """Requests for what is not there; fills ``metas`` on the way."""
    for prompt in prompts:
        numbers = tuple(k for k in range(n) if (system.name, prompt.prompt_id, k) not in folder.samples)
        if numbers:
            metas[prompt.prompt_id] = prompt.meta
            yield PromptRequest(prompt, numbers, system.control(prompt.meta) if system.control else None)


def _sample(key: tuple[str, str, int], completion: GeneratedText, found: dict[str, Any]) -> Sample:
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
    )


class _Progress:
    """A bar on a terminal, a line every now and then in a log file."""

    def __init__(self, name: str, total: int, missing: int) -> None:
        self._name, self._total, self._done = name, total, total - missing

    def __enter__(self) -> "_Progress":
        self._bar = tqdm(
            desc=self._name, total=self._total, initial=self._done, disable=not sys.stderr.isatty(), dynamic_ncols=True
        )
        self._told = time.monotonic()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def add(self, tokens_per_s: float) -> None:
        self._done += 1
        self._bar.set_postfix({"tokens/s": f"{tokens_per_s:,.0f}"}, refresh=False)
        self._bar.update()
        if self._bar.disable and time.monotonic() - self._told >= _TELL_SECONDS:
            self._told = time.monotonic()
            print(
                f"{self._name}: {self._done:,}/{self._total:,} samples, {tokens_per_s:,.0f} tokens/s",
                file=sys.stderr,
                flush=True,
            )
