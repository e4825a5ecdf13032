"""What was sampled, in numbers: lengths, share truncated, the gamma they suggest, a histogram."""

import math
import shutil
from array import array
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import Any

from ..models import embedded

PERCENTILES = (1, 50, 90, 99)


class LengthCounts:
    """Lengths and log-probabilities of completions, as they come in.

    Attributes:
        lengths: tokens, EOS included; truncated ones as long as they were seen.
        tokens: of all completions together.
        truncated: number of completions that hit the limit.
        reencoded: number of completions whose ids come from their text.
    """

    def __init__(self) -> None:
        self.lengths = array("q")
        self.tokens = self.truncated = self.reencoded = 0
        self._logprobs = array("d")
        self._logprob_tokens = 0

    def add(self, length: int, truncated: bool, logprob: float | None, reencoded: bool) -> None:
        """Count a completion of ``length`` tokens, whose log-probability (nats) is known or None."""
        if logprob is not None and math.isfinite(logprob):
            self._logprobs.append(logprob)
            self._logprob_tokens += length
        self.lengths.append(length)
        self.tokens += length
        self.truncated += truncated
        self.reencoded += reencoded

    @property
    def truncated_share(self) -> float:
        """Share of completions that hit the limit, in [0, 1]."""
        return self.truncated / len(self.lengths) if self.lengths else 0.0

    @property
    def logprob_per_token(self) -> float | None:
        """Mean log-probability of a token (nats) where it is known; the same in whatever order they came."""
        return math.fsum(self._logprobs) / self._logprob_tokens if self._logprob_tokens else None


@dataclass(frozen=True)
class Summary:
    """What was sampled.

    Attributes:
        generator: its name.
        tiny_world: whether it is one of the embedded ones.
        prompts: number of prompts.
        completions: number of completions that are there.
        failed: number of completions that failed for good.
        tokens: tokens of all completions, EOS included.
        length_tokens: percentiles (``p50``, …), ``mean`` and ``max`` of the lengths; truncated ones count as long as
            they were seen.
        limit_tokens: where completions were truncated.
        truncated_share: share that was truncated, in [0, 1].
        gamma: suggested by the 99th-percentile length.
        gamma_is_low: True = more than 1% was truncated, so that length, and gamma with it, is only known to be greater.
        reencoded_share: share whose ids come from their text.
        logprob_per_token: mean log-probability of a token (nats), before temperature and truncation; None = unknown.
        tokens_per_s: of the run that finished it; None where that sampled nothing.
        aborted: True = the limit was found on the way, see `quantile_limit`.
    """

    generator: str
    tiny_world: bool
    prompts: int
    completions: int
    failed: int
    tokens: int
    length_tokens: dict[str, float]
    limit_tokens: int
    truncated_share: float
    gamma: float
    gamma_is_low: bool
    reencoded_share: float
    logprob_per_token: float | None
    tokens_per_s: float | None
    aborted: bool = False

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        values = {"format": 1, **asdict(self)}
        return values if self.aborted else {name: one for name, one in values.items() if name != "aborted"}


def summarise(
    counts: LengthCounts,
    *,
    generator: str,
    prompts: int,
    failed: int,
    limit: int,
    tokens_per_s: float | None,
    aborted: bool = False,
) -> Summary:
    """Sum up at least one completion; see `Summary`."""
    import numpy as np

    from ..values import gamma_for_length

    lengths = np.asarray(counts.lengths)
    at = dict(zip((f"p{p}" for p in PERCENTILES), np.percentile(lengths, PERCENTILES).tolist(), strict=True))
    return Summary(
        generator=generator,
        tiny_world=PurePath(generator).name in embedded.generators(),
        prompts=prompts,
        completions=len(lengths),
        failed=failed,
        tokens=int(lengths.sum()),
        length_tokens={**at, "mean": float(lengths.mean()), "max": int(lengths.max())},
        limit_tokens=limit,
        truncated_share=counts.truncated_share,
        gamma=gamma_for_length(max(1.0, at["p99"])),
        gamma_is_low=counts.truncated_share > 0.01,
        reencoded_share=counts.reencoded / len(lengths),
        logprob_per_token=counts.logprob_per_token,
        tokens_per_s=tokens_per_s,
        aborted=aborted,
    )


def as_text(summary: dict[str, Any]) -> str:
    """A few lines for people about a summary as it is stored."""
    length, truncated = summary["length_tokens"], summary["truncated_share"]

    def tokens(name: str, quantile: float) -> str:
        # Beyond the share that ended by itself, a percentile is only known to be at least the limit.
        return f"{'≥ ' if quantile > 1 - truncated else ''}{length[name]:,.0f}"

    lines = [
        f"{summary['completions']:,} completions of {summary['prompts']:,} prompts by {summary['generator']}, "
        f"{summary['tokens']:,} tokens"
        + (f", {summary['tokens_per_s']:,.0f} tokens/s" if summary["tokens_per_s"] else "")
        + (f"; {summary['failed']:,} failed" if summary["failed"] else ""),
        "  lengths in tokens: "
        + ", ".join(f"p{p} {tokens(f'p{p}', p / 100)}" for p in PERCENTILES)
        + f", max {tokens('max', 1.0)}; truncated at {summary['limit_tokens']:,}: {truncated:.1%}",
        f"  gamma suggested {'at least ' if summary['gamma_is_low'] else ''}{summary['gamma']:.5f}"
        + ("" if (mean := summary["logprob_per_token"]) is None else f"; log-probability of a token {mean:.3f} nats")
        + (f"; ids re-encoded from text: {summary['reencoded_share']:.1%}" if summary["reencoded_share"] else ""),
    ]
    if summary["gamma_is_low"]:
        lines.append(
            "  more than 1% was truncated, so the 99th-percentile length is only known to be at least the limit: "
            + (
                "what was aborted to end the batch early is learned from as right-censored"
                if summary.get("aborted")
                else "sample with more max_tokens if you can"
            )
        )
    notice = embedded.notice(PurePath(summary["generator"]).name)
    if summary["tiny_world"] and notice:
        lines.append(f"  {notice}")
    return "\n".join(lines)


def write_histogram(folder: Path, counts: LengthCounts) -> None:
    """Write the histogram of the lengths into ``folder``, for TensorBoard; one from before goes."""
    import numpy as np
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(folder, ignore_errors=True)
    with SummaryWriter(str(folder)) as writer:
        writer.add_histogram("rollouts/length_tokens", np.asarray(counts.lengths), global_step=0, bins="auto")
