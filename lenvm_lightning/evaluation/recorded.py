"""Rollouts that are there already take the place of samples: nothing is sampled, and no generator is loaded."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError, EvaluationError, StoreError
from ..models import embedded
from ..rollouts.generators.interface import Prompt
from ..rollouts.held_out import role_of
from ..rollouts.read import read_rollouts, rollouts_file
from ..rollouts.record import Rollout
from .samples import Sample

_SHOWN = 5  # prompts in a message


@dataclass(frozen=True)
class Recorded:
    """Rollouts of a file as an evaluation takes them.

    Attributes:
        prompts: their prompts, in the order of the file.
        samples: their completions, as if `base` had been asked.
        of: prompts that there are without a limit.
        description: the file, its digest, and which split was taken; JSON values.
        generator: who wrote them, as they say; None where they do not.
        sampling: settings of sampling that they have in common, as they say.
        max_tokens: where truncated ones were truncated; without any, what none of them has more of.
    """

    prompts: list[Prompt]
    samples: list[Sample]
    of: int
    description: dict[str, Any]
    generator: str | None
    sampling: dict[str, Any]
    max_tokens: int

    @property
    def tokenizer(self) -> str | None:
        """Where the tokenizer of their prompts is: that of an embedded generator; None where nobody says."""
        return self.generator if self.generator and embedded.is_embedded(self.generator) else None


def read_recorded(place: Path, limit: int | None = None) -> Recorded:
    """Read a file of rollouts, or that of a folder which `lenvm sample` wrote.

    Where any prompt's split is a held-out one, only those are taken; else all are.

    Args:
        place: of the file or folder.
        limit: only so many prompts.

    Raises:
        EvaluationError: it is not there, completions have no token ids, or one prompt_id stands for several prompts.
        DataError: it cannot be read.
    """
    try:
        file = rollouts_file(place)
    except StoreError as error:
        raise EvaluationError(f"--rollouts: {error}") from error
    rollouts = list(read_rollouts(file))
    if not rollouts:
        raise EvaluationError(f"--rollouts: {file} has no completions")
    held_out = [one for one in rollouts if role_of(one.split) == "test"]
    by_prompt: dict[str, list[Rollout]] = {}
    for one in held_out or rollouts:
        by_prompt.setdefault(one.prompt_id, []).append(one)
    _require_sound(file, by_prompt)
    taken = dict(list(by_prompt.items())[:limit])
    completions = [one for some in taken.values() for one in some]
    names = {one.generator for one in completions}
    if len(names) > 1:
        raise EvaluationError(f"--rollouts: {file} is of several generators: {', '.join(sorted(map(str, names)))}")
    return Recorded(
        prompts=[Prompt(key, some[0].messages, tuple(some[0].images), some[0].split) for key, some in taken.items()],
        samples=[_sample(key, number, one) for key, some in taken.items() for number, one in enumerate(some)],
        of=len(by_prompt),
        description={"file": str(file), "digest": _digest(file), "split": "test" if held_out else None},
        generator=names.pop(),
        sampling=_in_common([one.sampling for one in completions]),
        max_tokens=_limit_of(completions),
    )


def _require_sound(file: Path, by_prompt: dict[str, list[Rollout]]) -> None:
    """Refuse what cannot be measured, all of it at once.

    Raises:
        EvaluationError: see `read_recorded`.
    """
    without = [key for key, some in by_prompt.items() if not all(one.token_ids for one in some)]
    unlike = [
        key
        for key, some in by_prompt.items()
        if any((one.messages, one.images) != (some[0].messages, some[0].images) for one in some)
    ]
    problems = []
    if without:
        problems.append(
            f"{len(without):,} prompts have completions without token_ids, such as {_some(without)}: how long they "
            "were in the generator's own tokens is not known"
        )
    if unlike:
        problems.append(f"{len(unlike):,} prompt_ids stand for several prompts, such as {_some(unlike)}")
    if problems:
        raise EvaluationError(f"--rollouts: {file} cannot be measured on:\n  " + "\n  ".join(problems))


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:_SHOWN]))


def _sample(prompt_id: str, number: int, one: Rollout) -> Sample:
    assert one.token_ids is not None
    return Sample(
        "base",
        prompt_id,
        number,
        tokens=len(one.token_ids),
        finish_reason="length" if one.censored else "stop",
        logprob=None,
        found={},
        text=one.completion,
        token_ids=one.token_ids,
    )


def _in_common(sampling: Sequence[dict[str, Any]]) -> dict[str, Any]:
    first = sampling[0]
    return {name: first[name] for name in first if all(one.get(name) == first[name] for one in sampling)}


def _limit_of(completions: Sequence[Rollout]) -> int:
    """See `Recorded.max_tokens`; a batch that was aborted has a smaller limit than its settings say."""
    lengths = [len(one.token_ids or ()) for one in completions]
    if any(one.censored for one in completions):
        return max(lengths)
    known = [most for one in completions if isinstance(most := one.sampling.get("max_tokens"), int)]
    return max([*lengths, *known])


def _digest(file: Path) -> str:
    try:
        with file.open("rb") as source:
            return hashlib.file_digest(source, "sha256").hexdigest()[:32]
    except OSError as error:
        raise DataError(f"{file}: it cannot be read: {error.strerror}") from error
