"""Settings of drawing tokens; here and not beside `sampling` so that a command line needs no torch."""

import hashlib
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Drawing:
    """How a token is drawn.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: so many likeliest tokens; 0 keeps all.
        top_p: smallest set of likeliest tokens whose probability reaches this; 1 keeps all.
        min_p: tokens at least this times as likely as the likeliest; 0 keeps all.

    Raises:
        ValueError: settings are out of range; all of them are named.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        problems = []
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            problems.append(f"temperature must be at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p must lie above 0 and at most at 1, got {self.top_p}")
        if self.top_k < 0:
            problems.append(f"top_k must be at least 0 (0: all tokens), got {self.top_k}")
        if not 0 <= self.min_p < 1:
            problems.append(f"min_p must lie between 0 and 1, got {self.min_p}")
        if problems:
            raise ValueError("; ".join(problems))


def completion_seed(seed: int, prompt_id: str, number: int) -> int:
    """Return the seed of one completion, in [0, 2^31): it depends on nothing but these three."""
    digest = hashlib.blake2b(f"{seed}\n{prompt_id}\n{number}".encode(), digest_size=4).digest()
    return int.from_bytes(digest) >> 1
