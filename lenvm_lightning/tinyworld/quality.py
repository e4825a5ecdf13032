"""How well a tiny model does what it is there for: the figures that its recipe must reach."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..decoding.sampling_params import SamplingParams
from ..rollouts.constraint import length_score
from ..rollouts.generators.interface import Answer, GeneratedText, Generator, PromptRequest
from .prompt_sets import check, prompt_set


@dataclass(frozen=True)
class Quality:
    """Figures of one prompt set, from n completions each of held-out prompts at temperature 1.

    Attributes:
        completions: how many were drawn.
        pass_at_1: share of completions that pass the check of their prompt; None where no prompt has one.
        mean_tokens: of a completion, EOS included.
        p50: median tokens.
        p99: 99th percentile of tokens.
        shortest_correct: tokens of a prompt's shortest correct completion over the mean of all of its completions,
            averaged over prompts with a correct one; None where there are none.
        equal_to_score: mean Length Score of the prompts that demand "equal to N"; None where there are none.
        logprob_per_token: nats.
        truncated: share that reached the token limit.
    """

    completions: int
    pass_at_1: float | None
    mean_tokens: float
    p50: float
    p99: float
    shortest_correct: float | None
    equal_to_score: float | None
    logprob_per_token: float
    truncated: float


SETS = {"tiny-text": ("tiny-math", "tiny-write"), "tiny-vl": ("tiny-vqa",)}


def compare(folder: Path, name: str, prompts: int = 64) -> dict[str, dict[str, Quality]]:
    """Quality of a tiny model just trained, beside that of the shipped one, on every prompt set it is there for.

    Args:
        folder: the model directory.
        name: which of the tiny models it is.
        prompts: held-out prompts of each set.

    Returns:
        By prompt set: ``trained`` and ``shipped``.
    """
    from ..rollouts.generators.local import LocalGenerator

    sources = {"trained": str(folder), "shipped": name}
    return {
        which: {who: measure(LocalGenerator.load(source), which, prompts) for who, source in sources.items()}
        for which in SETS[name]
    }


def as_table(results: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> str:
    """The figures of `compare`, each quality as a plain mapping, in columns."""
    lines = [
        "| prompts | model | Pass@1 ↑ | median tokens | 99th percentile | shortest right of 16 / mean "
        "| Length Score, equal to N | log p a token |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for which, qualities in results.items():
        for who, q in qualities.items():
            figures = [
                ("pass_at_1", ".3f"), ("p50", ".0f"), ("p99", ".0f"),
                ("shortest_correct", ".2f"), ("equal_to_score", ".0f"), ("logprob_per_token", ".2f"),
            ]  # fmt: skip
            cells = ["–" if (value := q[key]) is None else format(value, form) for key, form in figures]
            lines.append(f"| {which} | {who} | {' | '.join(cells)} |")
    return "\n".join(lines)


def measure(generator: Generator, name: str, prompts: int = 64, n: int = 16, max_tokens: int = 768) -> Quality:
    """Sample held-out prompts of the set `name` and judge them.

    Raises:
        RuntimeError: a prompt failed; the tiny sets hold nothing that a tiny model may refuse.
    """
    asked = prompt_set(name, "test", prompts)
    requests = [PromptRequest(prompt, tuple(range(n))) for prompt in asked]
    answers: dict[str, list[GeneratedText]] = {prompt.prompt_id: [] for prompt in asked}
    for answer in generator.sample(requests, SamplingParams(max_tokens=max_tokens)):
        answers[answer.prompt_id].append(_completion(answer))
    return _quality([(prompt.meta, answers[prompt.prompt_id]) for prompt in asked])


def _completion(answer: Answer) -> GeneratedText:
    if not isinstance(answer.result, GeneratedText):
        raise RuntimeError(f"{answer.prompt_id}: {answer.result.reason}")
    return answer.result


def _quality(judged: Sequence[tuple[dict[str, Any], list[GeneratedText]]]) -> Quality:
    verdicts: list[bool] = []
    shares: list[float] = []
    scores: list[float] = []
    for meta, completions in judged:
        lengths = [len(completion.token_ids) for completion in completions]
        right = [check(meta, c.text, length) for c, length in zip(completions, lengths, strict=True)]
        verdicts += [bool(verdict) for verdict in right if verdict is not None]
        correct = [length for length, verdict in zip(lengths, right, strict=True) if verdict]
        if correct:
            shares.append(min(correct) / float(np.mean(lengths)))
        if meta.get("constraint") == "equal to":
            scores += [length_score(length - 1, meta["length"], "equal to") for length in lengths]
    every = [completion for _, completions in judged for completion in completions]
    tokens = np.asarray([len(completion.token_ids) for completion in every])
    p50, p99 = np.percentile(tokens, [50, 99])
    return Quality(
        completions=len(every),
        pass_at_1=float(np.mean(verdicts)) if verdicts else None,
        mean_tokens=float(tokens.mean()),
        p50=float(p50),
        p99=float(p99),
        shortest_correct=float(np.mean(shares)) if shares else None,
        equal_to_score=float(np.mean(scores)) if scores else None,
        logprob_per_token=sum(c.logprob or 0.0 for c in every) / float(tokens.sum()),
        truncated=float(np.mean([completion.finish_reason == "length" for completion in every])),
    )
