"""What the data looks like, said before any training: bad rows with file and line, lengths, padding, a gamma."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from lenvm_lightning.censoring import tail_after_cut
from lenvm_lightning.errors import DataError
from lenvm_lightning.training.packing import pack, width_of
from lenvm_lightning.values import gamma_for_length

SHOWN = 20
_LITTLE = 0.95  # share of the tokens left above which sharing is hardly worth it
_PACKED = 1000  # batches that are packed to find out how much of them is padding


@dataclass(frozen=True)
class Problem:
    """Something wrong with a row: where (``file:line``) and what."""

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
        p50: median completion length in tokens, EOS included; cut ones count as long as they were seen.
        p99: 99th percentile.
        longest: longest completion.
        cut_share: share that hit its token limit.
        tail_after_cut: tokens expected after the limit, see `tail_after_cut`.
        sampling: the sampling settings met, as text, with their counts.
        generators: the generators met, with their counts.
    """

    completions: int
    prompts: int
    p50: float
    p99: float
    longest: int
    cut_share: float
    tail_after_cut: float | None = None
    sampling: dict[str, int] = field(default_factory=dict)
    generators: dict[str, int] = field(default_factory=dict)

    @property
    def gamma(self) -> float:
        """The paper's choice: 99% of the value range at the 99th-percentile length."""
        return gamma_for_length(self.p99)

    @property
    def gamma_is_low(self) -> bool:
        """Whether more than 1% was cut, so that p99, and gamma with it, is only known to be greater."""
        return self.cut_share > 0.01


def padding_share(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> float:
    """Share of the padded tokens of all batches that is padding, in [0, 1)."""
    padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    return 1.0 - sum(lengths[row] for batch in batches for row in batch) / padded if padded else 0.0


def packed_padding_share(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> float:
    """Share of the tokens of packed batches that is padding, in [0, 1); of 1,000 of them where there are more."""
    real = computed = 0
    for batch in batches[:: -(-len(batches) // _PACKED) or 1]:
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
    every = sum(lengths[row] for batch in batches for row in batch)
    again = every
    for batch in batches:
        once = {prompts[row]: prompt_lengths[row] for row in batch}
        again -= sum(prompt_lengths[row] for row in batch) - sum(once.values())
    return again / every if every else 1.0


def completions_meeting(prompts: Sequence[int], batches: Sequence[Sequence[int]]) -> float:
    """How many completions of a row's prompt are in the row's batch, itself included; mean over all rows."""
    pairs = sum(n * n for batch in batches for n in Counter(prompts[row] for row in batch).values())
    return pairs / max(1, sum(map(len, batches)))


def collect_facts(
    lengths: Sequence[int], censored: Sequence[bool], prompt_ids: Sequence[str], sampling: Sequence[str],
    generators: Sequence[str],
) -> RolloutFacts:  # fmt: skip
    """Facts of the training rows, given column by column. At least one row."""
    sizes = np.asarray(lengths)
    return RolloutFacts(
        completions=len(sizes),
        prompts=len(set(prompt_ids)),
        p50=float(np.percentile(sizes, 50)),
        p99=float(np.percentile(sizes, 99)),
        longest=int(sizes.max()),
        cut_share=float(np.mean(censored)),
        tail_after_cut=tail_after_cut(lengths, censored),
        sampling=dict(Counter(s or "unknown" for s in sampling).most_common(5)),
        generators=dict(Counter(g or "unknown" for g in generators).most_common(20)),
    )


def describe_facts(
    facts: RolloutFacts, held_out: int, held_out_prompts: int, padding: float, batches: int,
    meeting: float | None = None, layout: str = "rows", shared: float | None = None,
) -> str:  # fmt: skip
    """A few lines for people."""
    unknown = "≥ " if facts.gamma_is_low else ""
    beyond = "" if facts.tail_after_cut is None else f", {facts.tail_after_cut:.0f} more tokens expected there"
    lines = [
        f"Rollouts: {facts.completions:,} completions of {facts.prompts:,} prompts to train on, "
        f"{held_out:,} of {held_out_prompts:,} held out",
        f"  lengths: median {'≥ ' if facts.cut_share > 0.5 else ''}{facts.p50:.0f} tokens, 99th percentile "
        f"{unknown}{facts.p99:.0f}, longest {'≥ ' if facts.cut_share else ''}{facts.longest:,}, "
        f"cut at their limit {facts.cut_share:.1%}{beyond}",
        f"  gamma suggested {'at least ' if facts.gamma_is_low else ''}{facts.gamma:.5f}; {batches} batches an epoch, "
        f"padding {padding:.1%} of the tokens"
        + (" (packed)" if layout == "packed" else " (of rows)" if layout == "shared" else "")
        + (f", {meeting:.1f} completions of a prompt meet in a batch" if meeting is not None else ""),
    ]
    if shared is not None:
        lines.append(f"  layout: shared computes a prompt once a batch, which leaves {shared:.1%} of the tokens")
        if shared > _LITTLE:
            lines[-1] += ": few completions of a prompt meet, set together (and see what it costs in its description)"
    if facts.gamma_is_low:
        lines.append(
            "  more than 1% was cut, so the 99th-percentile length is only known to be at least the limit, and "
            "`gamma: auto` may be too small: sample with more max_tokens if you can, or set gamma"
        )
    return "\n".join(lines)


def describe_problems(problems: Sequence[Problem], rows: int, what: str) -> str:
    """The first problems with place, and how often each kind occurs."""
    lines = [f"{len(problems):,} of {rows:,} completions {what}:"]
    lines += [f"  {problem}" for problem in problems[:SHOWN]]
    if len(problems) > SHOWN:
        lines.append(f"  … and {len(problems) - SHOWN:,} more")
    return "\n".join(lines)


def check_problems(problems: Sequence[Problem], rows: int, max_bad_share: float, log: str) -> None:
    """Stop if too many rows are bad.

    Raises:
        DataError: the share of bad rows is above ``max_bad_share``, or none is good.
    """
    share = len(problems) / max(1, rows)
    if problems and (share > max_bad_share or len(problems) == rows):
        raise DataError(
            describe_problems(problems, rows, "cannot be used")
            + f"\nThat is {share:.1%}, more than data.max_bad_share = {max_bad_share:.1%}. Mend the rows, or raise the "
            f"setting to train without them. All of them are listed in {log}"
        )
