"""What the data looks like, said before any training: bad rows with file and line, lengths, padding, a gamma."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from lenvm_lightning.batch import LayoutKind
from lenvm_lightning.censoring import tail_after_cut
from lenvm_lightning.errors import DataError
from lenvm_lightning.training.packing import pack, width_of
from lenvm_lightning.values import gamma_for_length

from .split import RowFacts

SHOWN = 20  # problems that are printed; all of them are in the log
_LITTLE = 0.95  # share of the tokens left above which sharing is hardly worth it
_PACKED = 1000  # batches that are packed to find out how much of them is padding: each takes a moment
_MOST_SAMPLINGS = 5  # different sampling settings that are kept, each a line of text
_MOST_GENERATORS = 20


@dataclass(frozen=True)
class RowProblem:
    """Something wrong with a row: where (`file:line`) and what."""

    place: str
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"


@dataclass(frozen=True)
class RolloutFacts:
    """Lengths and origin of the training completions.

    Attributes:
        completions: number of training completions.
        prompts: number of training prompts.
        p50: median completion length in tokens, EOS included; truncated ones count as long as they were seen.
        p99: 99th percentile.
        longest: longest completion.
        truncated_share: share of completions truncated at their token limit.
        tail_after_cut: tokens expected after the limit, see `tail_after_cut`.
        sampling: the sampling settings met, as text, with their counts.
        generators: the generators met, with their counts.
    """

    completions: int
    prompts: int
    p50: float
    p99: float
    longest: int
    truncated_share: float
    tail_after_cut: float | None = None
    sampling: dict[str, int] = field(default_factory=dict)
    generators: dict[str, int] = field(default_factory=dict)

    @property
    def gamma(self) -> float:
        """The paper's choice: 99% of the value range at the 99th-percentile length."""
        return gamma_for_length(self.p99)

    @property
    def gamma_is_low(self) -> bool:
        """Whether more than 1% was truncated, so that p99, and gamma with it, is only known to be greater."""
        return self.truncated_share > 0.01


def padding_share(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> float:
    """Share of the padded tokens of all batches that is padding, in [0, 1)."""
    real = padded = 0
    for batch in batches:
        sizes = [lengths[row] for row in batch]
        real += sum(sizes)
        padded += len(sizes) * max(sizes)
    return 1.0 - real / padded if padded else 0.0


def packed_padding_share(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> float:
    """Share of the tokens of packed batches that is padding, in [0, 1); of 1,000 of them where there are more."""
    real = computed = 0
    step = max(1, -(-len(batches) // _PACKED))
    for batch in batches[::step]:
        sizes = [lengths[row] for row in batch]
        bins = pack(sizes)
        real += sum(sizes)
        computed += len(bins) * width_of(bins, sizes)
    return 1.0 - real / computed if computed else 0.0


def shared_share(
    lengths: Sequence[int], prompt_lengths: Sequence[int], prompts: Sequence[int], batches: Sequence[Sequence[int]]
) -> float:
    """Share of the real tokens that is left where each prompt is computed once a batch, in (0, 1].

    Args:
        lengths: tokens of each row.
        prompt_lengths: tokens of each row's prompt.
        prompts: number of each row's prompt.
        batches: row numbers of each batch.
    """
    every = left = 0
    for batch in batches:
        tokens = sum(lengths[row] for row in batch)
        prompt_tokens = sum(prompt_lengths[row] for row in batch)
        once = {prompts[row]: prompt_lengths[row] for row in batch}
        every += tokens
        left += tokens - prompt_tokens + sum(once.values())
    return left / every if every else 1.0


def completions_meeting(prompts: Sequence[int], batches: Sequence[Sequence[int]]) -> float:
    """How many completions of a row's prompt are in the row's batch, itself included; mean over all rows."""
    rows = pairs = 0
    for batch in batches:
        rows += len(batch)
        of_prompts = Counter(prompts[row] for row in batch)
        pairs += sum(count * count for count in of_prompts.values())
    return pairs / max(1, rows)


@dataclass(frozen=True)
class BatchFacts:
    """What an epoch of training batches looks like.

    Attributes:
        count: batches.
        layout: how they are computed.
        padding: share of their tokens that is padding, in [0, 1); under `shared` as if they were rows.
        meeting: completions of a row's prompt in its batch, see `completions_meeting`; None where they are not grouped.
        shared: see `shared_share`; None in other layouts.
    """

    count: int
    layout: LayoutKind = "rows"
    padding: float = 0.0
    meeting: float | None = None
    shared: float | None = None


def collect_batch_facts(
    batches: Sequence[Sequence[int]],
    *,
    lengths: Sequence[int],
    prompt_lengths: Sequence[int],
    prompts: Sequence[int],
    layout: LayoutKind,
    groups_completions: bool,
) -> BatchFacts:
    """Facts of the batches of an epoch.

    Args:
        batches: row numbers of each batch.
        lengths: tokens of each row.
        prompt_lengths: tokens of each row's prompt.
        prompts: number of each row's prompt.
        layout: how they are computed.
        groups_completions: True = completions of a prompt are kept in one batch.
    """
    padding = packed_padding_share(lengths, batches) if layout == "packed" else padding_share(lengths, batches)
    return BatchFacts(
        count=len(batches),
        layout=layout,
        padding=padding,
        meeting=completions_meeting(prompts, batches) if groups_completions else None,
        shared=shared_share(lengths, prompt_lengths, prompts, batches) if layout == "shared" else None,
    )


def collect_facts(rows: Sequence[RowFacts]) -> RolloutFacts:
    """Facts of the training rows, at least one."""
    lengths = [row.length for row in rows]
    censored = [row.censored for row in rows]
    sampling = Counter(row.sampling or "unknown" for row in rows)
    generators = Counter(row.generator or "unknown" for row in rows)
    return RolloutFacts(
        completions=len(rows),
        prompts=len({row.prompt_id for row in rows}),
        p50=float(np.percentile(lengths, 50)),
        p99=float(np.percentile(lengths, 99)),
        longest=max(lengths),
        truncated_share=float(np.mean(censored)),
        tail_after_cut=tail_after_cut(lengths, censored),
        sampling=dict(sampling.most_common(_MOST_SAMPLINGS)),
        generators=dict(generators.most_common(_MOST_GENERATORS)),
    )


def describe_facts(facts: RolloutFacts, batches: BatchFacts, held_out: int, held_out_prompts: int) -> str:
    """A few lines for people.

    Args:
        facts: of the training completions.
        batches: of an epoch.
        held_out: completions.
        held_out_prompts: their prompts.
    """
    lines = [
        f"Rollouts: {facts.completions:,} completions of {facts.prompts:,} prompts to train on, "
        f"{held_out:,} of {held_out_prompts:,} held out",
        _describe_lengths(facts),
        _describe_batches(facts, batches),
    ]
    if batches.shared is not None:
        left = f"  layout: shared computes a prompt once a batch, which leaves {batches.shared:.1%} of the tokens"
        if batches.shared > _LITTLE:
            left += (
                ": few completions of a prompt meet, set completions_per_batch (and see what it costs in its "
                "description)"
            )
        lines.append(left)
    if facts.gamma_is_low:
        lines.append(
            "  more than 1% was truncated, so the 99th-percentile length is only known to be at least the limit, and "
            "`gamma: auto` may be too small: sample with more max_tokens if you can, or set gamma"
        )
    return "\n".join(lines)


def _describe_lengths(facts: RolloutFacts) -> str:
    """Lengths, with "≥" before those that truncated completions may exceed."""
    median = f"{'≥ ' if facts.truncated_share > 0.5 else ''}{facts.p50:.0f}"
    p99 = f"{'≥ ' if facts.gamma_is_low else ''}{facts.p99:.0f}"
    longest = f"{'≥ ' if facts.truncated_share else ''}{facts.longest:,}"
    beyond = "" if facts.tail_after_cut is None else f", {facts.tail_after_cut:.0f} more tokens expected there"
    return (
        f"  lengths: median {median} tokens, 99th percentile {p99}, longest {longest}, truncated at their limit "
        f"{facts.truncated_share:.1%}{beyond}"
    )


def _describe_batches(facts: RolloutFacts, batches: BatchFacts) -> str:
    gamma = f"{'at least ' if facts.gamma_is_low else ''}{facts.gamma:.5f}"
    counted = {"rows": "", "packed": " (packed)", "shared": " (of rows)"}[batches.layout]
    meeting = ""
    if batches.meeting is not None:
        meeting = f", {batches.meeting:.1f} completions of a prompt meet in a batch"
    return (
        f"  gamma suggested {gamma}; {batches.count} batches an epoch, padding {batches.padding:.1%} of the tokens"
        f"{counted}{meeting}"
    )


def describe_problems(problems: Sequence[RowProblem], rows: int, what: str) -> str:
    """The first problems with place, and how often each kind occurs."""
    lines = [f"{len(problems):,} of {rows:,} completions {what}:"]
    lines += [f"  {problem}" for problem in problems[:SHOWN]]
    if len(problems) > SHOWN:
        lines.append(f"  … and {len(problems) - SHOWN:,} more")
    return "\n".join(lines)


def check_problems(problems: Sequence[RowProblem], rows: int, max_bad_share: float, log: str) -> None:
    """Stop if too many rows are bad.

    Raises:
        DataError: the share of bad rows is above `max_bad_share`, or none is good.
    """
    share = len(problems) / max(1, rows)
    if problems and (share > max_bad_share or len(problems) == rows):
        raise DataError(
            describe_problems(problems, rows, "cannot be used")
            + f"\nThat is {share:.1%}, more than data.max_bad_share = {max_bad_share:.1%}. Fix the rows, or raise the "
            f"setting to train without them. All of them are listed in {log}"
        )
