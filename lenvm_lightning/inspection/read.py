"""What a length value model thinks at every token of some completions."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..decoding.text_stream import TextStream
from ..errors import DataError, named
from ..models.processors import tokenizer_of
from ..models.value_model import LengthValueModel
from ..rollouts.generators.interface import Prompt
from ..rollouts.read import read_rollouts
from ..utils.json_input import parse_json
from .rollout_values import values_of


@dataclass(frozen=True)
class CandidateReading:
    """A token that might have been written.

    Attributes:
        text: that it stands for.
        prob: of the base model, after temperature and truncation.
        remaining: tokens that would follow it.
        guided: probability under the control, from which was drawn.
        chosen: True = it was written.
    """

    text: str
    prob: float
    remaining: float
    guided: float
    chosen: bool


@dataclass(frozen=True)
class TokenReading:
    """One token.

    Attributes:
        id: of the vocabulary.
        text: that it stands for; empty for an end token.
        value: of the state after it, -(1 - gamma ** remaining).
        remaining: tokens still to come after it.
        moved: tokens by which it changed the length that is expected of the whole completion; below 0 = shorter.
        candidates: that it was chosen from, the chosen one first; known of texts written under a control just now.
    """

    id: int
    text: str
    value: float
    remaining: float
    moved: float
    candidates: list[CandidateReading] = field(default_factory=list)


@dataclass(frozen=True)
class CompletionReading:
    """One completion.

    Attributes:
        prompt_id: of its prompt.
        prompt: its messages.
        images: of the prompt: paths, in the order of their marks.
        name: what tells it from others of the prompt, such as ``0`` or ``ours 0``.
        expected: tokens, before the first one.
        tokens: that were written.
        truncated: True = it had not ended, and its true length is not known.
    """

    prompt_id: str
    prompt: list[dict[str, str]]
    images: list[str]
    name: str
    expected: float
    tokens: list[TokenReading]
    truncated: bool

    def as_dict(self) -> dict[str, Any]:
        """JSON values; candidates where they are known."""
        found = asdict(self)
        for token in found["tokens"]:
            if not token["candidates"]:
                del token["candidates"]
        return found


@dataclass(frozen=True)
class Written:
    """A completion to be read.

    Attributes:
        prompt: what was asked.
        token_ids: what was written; None = of ``text``, encoded here.
        text: of the completion.
        name: what tells it from others of its prompt.
        truncated: True = it had not ended.
    """

    prompt: Prompt
    token_ids: list[int] | None
    text: str
    name: str
    truncated: bool = False


def completions_of(file: Path) -> Iterator[Written]:
    """Completions in a file of rollouts, in its order.

    Raises:
        DataError: it cannot be read; the text says which line.
    """
    prompts: dict[str, Prompt] = {}
    counts: Counter[str] = Counter()
    for rollout in read_rollouts(file):
        prompt = Prompt(rollout.prompt_id, rollout.messages, tuple(rollout.images))
        kept = prompts.setdefault(rollout.prompt_id, prompt)
        name = str(counts[rollout.prompt_id])
        counts[rollout.prompt_id] += 1
        yield Written(kept, rollout.token_ids, rollout.completion, name, rollout.censored)


def completions_of_results(folder: Path) -> Iterator[Written]:
    """Completions in a folder of an evaluation, those of a prompt one after the other.

    Raises:
        DataError: it cannot be read, or holds no prompts.
    """
    if not (folder / "prompts.jsonl").is_file():
        raise DataError(
            f"{folder} holds no prompts.jsonl: its prompts have images, or it was made before they were kept. Inspect "
            "rollouts instead"
        )
    try:
        prompts: dict[tuple[str, str], Prompt] = {}
        for line in _lines(folder / "prompts.jsonl"):
            prompt = Prompt(line["prompt_id"], line["messages"])
            prompts |= {(system, prompt.prompt_id): prompt for system in line["systems"]}
        by_prompt: dict[str, list[tuple[str, int, Written]]] = {}
        for line in _lines(folder / "samples.jsonl"):
            name, truncated = f"{line['system']} {line['number']}", line["finish_reason"] == "length"
            written = Written(
                prompts[line["system"], line["prompt_id"]], line["token_ids"], line["text"], name, truncated
            )
            by_prompt.setdefault(line["prompt_id"], []).append((line["system"], line["number"], written))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: it cannot be read as results of lenvm-eval: {named(error)}") from error
    for some in by_prompt.values():
        yield from (written for *_, written in sorted(some, key=lambda one: one[:2]))


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    with open(file, "rb") as lines:
        for line in lines:
            yield parse_json(line)


def read_completions(
    lenvm: LengthValueModel, processor: Any, completions: Iterable[Written]
) -> Iterator[CompletionReading]:
    """What a length value model thinks of completions, in their order.

    Args:
        lenvm: in eval mode.
        processor: tokenizer or processor of its vocabulary.
        completions: of one generator.

    Raises:
        DataError: one that it cannot read.
    """
    tokenizer = tokenizer_of(processor)
    given = list(completions)
    ids = [
        one.token_ids if one.token_ids is not None else tokenizer(one.text, add_special_tokens=False)["input_ids"]
        for one in given
    ]
    pairs = ((one.prompt, of_one) for one, of_one in zip(given, ids, strict=True))
    found = dict(values_of(lenvm, processor, pairs))
    for number, (one, of_one) in enumerate(zip(given, ids, strict=True)):
        logits = found[number]
        if isinstance(logits, str):
            raise DataError(f"prompt {one.prompt.prompt_id!r} cannot be read: {logits}")
        remaining, value = lenvm.remaining(logits).tolist(), lenvm.value(logits).tolist()
        if not all(map(math.isfinite, remaining)):
            raise DataError(f"the length value model gives no number for prompt {one.prompt.prompt_id!r}: it is broken")
        if of_one and not one.truncated:  # nothing follows an end, by definition and not by prediction
            remaining[-1] = value[-1] = 0.0
        tokens = [
            TokenReading(
                token,
                text,
                value[place + 1],
                remaining[place + 1],
                remaining[place + 1] + 1 - remaining[place],
            )
            for place, (token, text) in enumerate(zip(of_one, _texts(tokenizer, of_one), strict=True))
        ]
        images = [image for image in one.prompt.images if isinstance(image, str)]
        yield CompletionReading(
            one.prompt.prompt_id, one.prompt.messages, images, one.name, remaining[0], tokens, one.truncated
        )


def _texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Text of each token; of a character that several tokens share, the last of them has it."""
    stream = TextStream(tokenizer)
    return [stream.add(token, last=number == len(ids)) for number, token in enumerate(ids, 1)]


def as_json(readings: Iterable[CompletionReading]) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(reading.as_dict(), ensure_ascii=False) + "\n" for reading in readings)
