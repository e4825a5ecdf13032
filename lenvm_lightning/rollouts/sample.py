"""Sampling rollouts: prompts and a generator in, a folder of records and its summary out, resumable."""

import functools
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..decoding.sampling_params import SamplingParams
from ..errors import GenerationError, GeneratorError, StoreError, nearest
from ..utils.foreign_text import without_credentials
from ..utils.json_input import parse_object, read_object
from ..utils.locked_folder import full_disk_in_a_sentence
from ..utils.progress import CompletionProgress
from .ask import ask_for_missing
from .generators.interface import Failure, Generator, Prompt, Prompts, Stoppable
from .quantile_limit import truncated_at
from .store import RolloutKey, RolloutRecord, RolloutStore, rollout_settings
from .summary import LengthCounts, as_text, summarise, write_histogram

_VLLM = "vllm:"
PromptOrder = Callable[[Iterator[Prompt]], Iterable[str]]
"""Prompts in their own order to their ids in the order in which they are to be started."""


@dataclass(frozen=True)
class SamplingOutcome:
    """How sampling ended.

    Attributes:
        folder: where the completions are.
        complete: ``rollouts.jsonl`` is there: every completion is, but for those that failed for good.
        failures: why completions are not there.
        summary: see `Summary`; None where it is not complete, or somebody deleted or broke it.
    """

    folder: Path
    complete: bool
    failures: dict[RolloutKey, Failure]
    summary: dict[str, Any] | None

    @property
    def status(self) -> int:
        """Exit status: 0 all completions are there, 3 some failed."""
        return 3 if self.failures else 0

    @property
    def rollouts(self) -> Path:
        """The final file."""
        return self.folder / "rollouts.jsonl"


def open_generator(source: str, /, **options: Any) -> Generator:
    """The generator for a name, a model directory, a hub id, ``vllm:`` before one, or the address of a server.

    Args:
        source: what it is.
        **options: arguments of ``LocalGenerator.load``, ``VLLMGenerator`` or ``ServerGenerator``; those that are None
            are left out.

    Raises:
        GeneratorError: it cannot be loaded or reached, or does not take an option.
    """
    make: Callable[..., Generator]
    if is_server(source):
        from .generators.server import ServerGenerator

        make = ServerGenerator
    elif is_vllm(source):
        from .generators.vllm import VLLMGenerator

        make = VLLMGenerator
    else:
        from .generators.local import LocalGenerator

        make = LocalGenerator.load
    given = {name: value for name, value in options.items() if value is not None}
    known = list(inspect.signature(make).parameters)[1:]
    anything = is_vllm(source)  # it knows its own settings, and there are many
    unknown = [f"{name!r}{nearest(name, known)}" for name in given if name not in known and not anything]
    if unknown:
        raise GeneratorError(
            f"{without_credentials(source)} takes no {', no '.join(unknown)} (it takes {', '.join(known)})"
        )
    return make(model_of(source), **given)


def is_server(source: str) -> bool:
    """Whether a generator is the address of a server."""
    return source.startswith(("http://", "https://"))


def is_vllm(source: str) -> bool:
    """Whether a generator is to be run by vLLM in this process."""
    return source.startswith(_VLLM)


def model_of(source: str) -> str:
    """The embedded name, directory or hub id of a generator in this process, whoever runs it; an address as it is."""
    return source.removeprefix(_VLLM)


@full_disk_in_a_sentence("What is done stays: make room, then type the same command again.")
def sample_rollouts(
    generator: Generator,
    prompts: Prompts,
    n: int,
    folder: Path,
    sampling: SamplingParams,
    *,
    abort_at_quantile: float | None = None,
    order: PromptOrder | None = None,
    wait: bool = False,
) -> SamplingOutcome:
    """Sample ``n`` completions of each prompt into a folder; goes on where an earlier run stopped.

    Progress and what went wrong is said on stderr.

    Args:
        generator: who is asked.
        prompts: from `load_prompts`.
        n: completions of a prompt.
        folder: where they go.
        sampling: how tokens are sampled.
        abort_at_quantile: truncate what is longer than the completion with whose end this share of all of them has
            ended, see `quantile_limit`; the generator has to be `Stoppable`.
        order: of the prompts that miss a completion; it decides when each is started, and not what it is.
        wait: wait where another process samples into the folder, instead of refusing.

    Raises:
        GenerationError: there is a share, but the generator does not stop early.
        StoreError: the folder is in use, holds completions sampled otherwise, or cannot be written; or nothing at
            all could be sampled.
        GeneratorError: the generator stopped. What is done stays, and the next call goes on from there.
    """
    if abort_at_quantile is not None and not isinstance(generator, Stoppable):
        raise GenerationError(
            f"abort_at_quantile: completions of {generator.name} come whole, so none can be stopped on its way. Take a "
            "model in this process (a name or a directory), or a smaller max_tokens."
        )
    settings = rollout_settings(generator.fingerprint(), prompts, n, sampling, abort_at_quantile)
    with RolloutStore(folder, prompts, settings, generator.name, wait) as store:
        for note in store.notes:
            _say(f"{folder}: {note}")
        if not store.complete:
            if store.done:
                _say(f"{folder}: going on from {store.done:,} of {store.total:,} completions")
            speed = _sample_missing(store, generator, sampling, order)
            if all(failure.final for failure in store.failures.values()):
                _finish(store, generator, sampling, speed)
        else:
            _say(f"{folder} is complete for these settings.")
        return _outcome(store)


def _outcome(store: RolloutStore) -> SamplingOutcome:
    summary = _read_object(store.summary) if store.complete else None
    return SamplingOutcome(store.folder, store.complete, store.failures, summary)


def _read_object(file: Path) -> dict[str, Any] | None:
    """A JSON object from a file; None where there is none."""
    try:
        return read_object(file)
    except (FileNotFoundError, ValueError):
        return None


def already_sampled(
    source: str,
    prompts: Prompts,
    n: int,
    folder: Path,
    sampling: SamplingParams,
    abort_at_quantile: float | None = None,
    /,
    **options: Any,
) -> SamplingOutcome | None:
    """The outcome of a complete folder, told without loading the generator; None where it has to be loaded.

    Args:
        source: what `open_generator` would be given.
        prompts: as for `sample_rollouts`.
        n: as there.
        folder: as there.
        sampling: as there.
        abort_at_quantile: as there.
        **options: what `open_generator` would be given.

    Raises:
        StoreError: it is complete, but was sampled with other settings.
    """
    settings = _read_object(folder / "settings.json")
    if not (folder / "rollouts.jsonl").exists() or settings is None:
        return None
    recorded = settings.get("generator")
    if not isinstance(recorded, dict) or not _is_recorded(source, recorded, options):
        return None
    wanted = rollout_settings(recorded, prompts, n, sampling, abort_at_quantile)
    with RolloutStore(folder, prompts, wanted, "") as store:
        _say(f"{folder} is complete for these settings.")
        return _outcome(store)


def _is_recorded(source: str, recorded: dict[str, Any], options: dict[str, Any]) -> bool:
    """Whether a fingerprint is that of a generator, as far as can be seen without loading it or asking a server."""
    same = all(recorded[key] == value for key, value in options.items() if key in recorded and value is not None)
    if is_server(source):
        return same and recorded.get("kind") == "server" and options.get("model") in (None, recorded.get("name"))
    from .generators.local.loading import digest, name_of

    if is_vllm(source):
        from .generators.vllm import deciding_options

        same = same and recorded.get("options", {}) == deciding_options(options)
    kind, model = "vllm" if is_vllm(source) else "transformers", model_of(source)
    same = same and recorded.get("kind") == kind and recorded.get("name") == name_of(model)
    return same and recorded.get("digest") == digest(model)


def _sample_missing(
    store: RolloutStore, generator: Generator, sampling: SamplingParams, order: PromptOrder | None
) -> float | None:
    """Sample what is missing; tokens a second, None where nothing was."""
    ids = None if order is None else list(order(store.unfinished()))
    failed = len(store.failures)
    progress = CompletionProgress(
        "sample",
        store.total,
        lambda: generator.tokens_written,
        sampling.max_tokens,
        there=store.done,
        tokens_there=store.counts.tokens,
        truncated=store.counts.truncated,
        failed=failed,
    )
    return ask_for_missing(
        generator,
        store.missing(ids),
        sampling,
        missing=store.total - store.done - failed,
        keep=store.add_answer,
        progress=progress,
        store=store,
    )


def _finish(store: RolloutStore, generator: Generator, sampling: SamplingParams, speed: float | None) -> None:
    if not store.done:
        raise StoreError(
            f"not one completion could be sampled:\n{group_failures(store.failures)}\n"
            f"Delete {store.failed} to ask again."
        )
    counts, limit, change = store.counts, sampling.max_tokens, None
    if store.limit is not None and store.limit() < limit and isinstance(generator, Stoppable):
        # Only now the limit is known: what ended beyond it before, or was stopped a little late, is cut back to it.
        limit = store.limit()
        change = functools.partial(truncated_at, limit=limit, text_of=generator.text_of)
        counts = _counts_of(store.final_lines(change))
    summary = summarise(
        counts,
        generator=store.generator,
        prompts=len(store.prompts),
        failed=len(store.failures),
        limit=limit,
        tokens_per_s=speed,
        aborted=store.limit is not None,
    )
    write_histogram(store.folder / "tensorboard", counts)
    store.finish(summary.as_dict(), store.final_lines(change))


def _counts_of(lines: Iterable[bytes]) -> LengthCounts:
    counts = LengthCounts()
    for line in lines:
        record = RolloutRecord.from_line(parse_object(line))
        counts.add(record.length, record.truncated, record.logprob, record.reencoded)
    return counts


def group_failures(failures: dict[RolloutKey, Failure]) -> str:
    """Reasons with how often they occur and one example each, the most frequent first."""
    counts = Counter(failures.values())
    lines = []
    for failure, count in counts.most_common(10):
        prompt_id, number = min(key for key, value in failures.items() if value == failure)
        again = "" if failure.final else " (tried again by the next run)"
        lines.append(f"  {count:,} × {failure.reason}{again}, such as completion {number} of prompt {prompt_id!r}")
    if len(counts) > 10:
        lines.append(f"  … and {len(counts) - 10:,} other reasons")
    return "\n".join(lines)


def report(outcome: SamplingOutcome) -> None:
    """Say how it ended: the summary on stdout; on stderr what failed, and what to do about it."""
    if outcome.failures:
        _say(
            f"{len(outcome.failures):,} completions failed, all listed in {outcome.folder / 'failures.jsonl'}:\n"
            + group_failures(outcome.failures)
        )
    if outcome.complete:
        if outcome.summary is not None:
            print(as_text(outcome.summary))
        print(f"\nrollouts: {outcome.rollouts}", flush=True)
    else:
        _say(
            f"{outcome.folder} is not complete: the same command tries those again and finishes. All completions that "
            f"are there can be used as they are: {outcome.folder / 'journal.jsonl'}"
        )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
