"""How tokens are sampled: documented and checked here, once. Needs no torch, so that a command line starts at once."""

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

from ..utils.settings import COUNT, INTEGER, Kind, is_integer, is_number, require_fit, setting


def _is_stop(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(text, str) and text for text in value)


_TEMPERATURE = Kind(float, lambda value: is_number(value) and value >= 0, "a number of at least 0")
_TOP_K = Kind(int, lambda value: is_integer(value) and value >= 0, "a whole number of at least 0 (0: all tokens)")
_TOP_P = Kind(float, lambda value: is_number(value) and 0 < value <= 1, "above 0 and at most 1")
_MIN_P = Kind(float, lambda value: is_number(value) and 0 <= value < 1, "at least 0 and below 1")
_STOP = Kind(str, _is_stop, "a list of texts, none of them empty")


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of a completion are sampled; what each field means is said beside it.

    Raises:
        ValueError: values that cannot be; all of them are named.
    """

    temperature: float = setting(_TEMPERATURE, "divides the logits; 0 takes the likeliest token", 1.0)
    top_k: int = setting(_TOP_K, "so many likeliest tokens; 0 keeps all", 0)
    top_p: float = setting(_TOP_P, "smallest set of likeliest tokens of this probability; 1 keeps all", 1.0)
    min_p: float = setting(_MIN_P, "tokens at least this times as likely as the likeliest; 0 keeps all", 0.0)
    max_tokens: int = setting(COUNT, "tokens after which a completion is truncated, its end included", 512)
    seed: int = setting(INTEGER, "of all that is sampled; each completion has its own, made from it", 0)
    stop: tuple[str, ...] = setting(_STOP, "texts after which a completion ends", ())

    def __post_init__(self) -> None:
        require_fit(self)
        object.__setattr__(self, "stop", tuple(self.stop))

    @property
    def truncation(self) -> tuple[float, int, float, float]:
        """What decides the distribution that one token is sampled from: temperature, top_k, top_p, min_p."""
        return self.temperature, self.top_k, self.top_p, self.min_p

    def as_dict(self) -> dict[str, Any]:
        """The settings as JSON values; without ``stop`` where there is none."""
        values = asdict(self)
        values["stop"] = list(self.stop)
        return {name: value for name, value in values.items() if name != "stop" or value}


GUIDED_SAMPLING = SamplingParams(temperature=1.0, top_k=15, top_p=0.999)
"""How guided decoding samples where nobody says otherwise: as on LIFEBench (Zhang et al.)."""


def completion_seed(seed: int, prompt_id: str, number: int) -> int:
    """Return the seed of one completion, in [0, 2^31): it depends on nothing but these three."""
    text = f"{seed}\n{prompt_id}\n{number}".encode("utf-8", "surrogatepass")  # half of a character has a seed, too
    digest = hashlib.blake2b(text, digest_size=4).digest()
    return int.from_bytes(digest) >> 1
