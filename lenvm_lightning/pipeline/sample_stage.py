"""The sample stage, of a recipe and of ``lenvm sample``: its settings, where it writes, running it."""

import contextlib
import gc
import hashlib
import json
import re
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..decoding.sampling_params import SamplingParams
from ..errors import RecipeError
from ..utils.foreign_text import without_credentials
from ..utils.settings import (
    COUNT,
    FOLDERS,
    OPTIONS,
    SHARE,
    SOURCES,
    TEXT,
    TRUTH,
    describe,
    misfits,
    setting,
    setting_of,
)


@dataclass(frozen=True)
class SampleSettings:
    """What to sample. All but those in `_ELSEWHERE` decides what the completions are."""

    generator: str = setting(
        TEXT, "an embedded model, a model directory, a hub id, vllm: before one of these, or a server's http:// address"
    )
    prompts: str | list[Any] = setting(SOURCES, "an embedded set, a JSONL file or a data set; several may be given")
    n: int = setting(COUNT, "completions of each prompt", 8)
    split: str | None = setting(TEXT, "only prompts of this split", None)
    limit: int | None = setting(COUNT, "only so many prompts", None)
    temperature: float = setting_of(SamplingParams, "temperature")
    top_p: float = setting_of(SamplingParams, "top_p")
    top_k: int = setting_of(SamplingParams, "top_k")
    min_p: float = setting_of(SamplingParams, "min_p")
    max_tokens: int = setting_of(SamplingParams, "max_tokens")
    seed: int = setting_of(SamplingParams, "seed")
    stop: list[str] | tuple[str, ...] = setting_of(SamplingParams, "stop")
    model: str | None = setting(TEXT, "which model, where a server has several", None)
    options: dict[str, Any] | None = setting(OPTIONS, "more for the generator, such as {concurrency: 64}", None)
    allow_images_from: str | list[str] | None = setting(
        FOLDERS, "other folders than that of the data from which images that rows name may be opened", None
    )
    longest_first: bool = setting(TRUTH, "start prompts first whose answers lenvm expects to be the longest", False)
    lenvm: str | None = setting(
        TEXT, "the length value model of longest_first (default: the embedded one of an embedded generator)", None
    )
    abort_at_quantile: float | None = setting(
        SHARE,
        "truncate what is longer than the completion with which this share of all has ended, such as .9; "
        "for generators in this process",
        None,
    )
    out: str | None = setting(TEXT, "folder of the completions (in a recipe: RUNS/rollouts/GENERATOR-DIGEST)", None)

    @property
    def sampling(self) -> SamplingParams:
        """How tokens are sampled."""
        return SamplingParams(**{one.name: getattr(self, one.name) for one in fields(SamplingParams)})

    def as_dict(self) -> dict[str, Any]:
        """The settings as a recipe has them, without what there is none of, and never with a password."""
        values = {**asdict(self), "stop": list(self.stop), "generator": without_credentials(self.generator)}
        return {name: value for name, value in values.items() if name not in _LEFT_OUT or value}


_ELSEWHERE = ("options", "allow_images_from", "longest_first", "lenvm", "out")  # do not decide what completions are
_LEFT_OUT = ("stop", "allow_images_from", "longest_first", "lenvm", "abort_at_quantile")  # where there is none of them
FIELDS = {f.name: f for f in fields(SampleSettings)}


def wrong_values(section: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, problem) of every value of a ``sample`` section that cannot be."""
    return misfits(section, FIELDS)


def help_text() -> str:
    """Every setting with its default, for people."""
    return describe(FIELDS)


def read_settings(section: dict[str, Any], where: str) -> SampleSettings:
    """Settings of a ``sample`` section whose keys are known to be right.

    Raises:
        RecipeError: what is missing or cannot be; all of it at once.
    """
    given = {key: value for key, value in section.items() if value is not None}
    problems = [f"{key} is missing" for key, f in FIELDS.items() if f.default is MISSING and key not in given]
    problems += [problem for _, problem in wrong_values(given)] or list(_contradictions(given))
    if problems:
        raise RecipeError(f"{where} cannot be sampled:\n  " + "\n  ".join(problems))
    return SampleSettings(**given)


def _contradictions(given: dict[str, Any]) -> Iterator[str]:
    """What cannot be together."""
    from ..rollouts.sample import is_server, is_vllm

    source = given.get("generator", "")
    if "lenvm" in given and not given.get("longest_first"):
        yield "lenvm is read by longest_first alone, which is not asked for"
    if "abort_at_quantile" in given and (is_server(source) or is_vllm(source)):
        yield (
            f"abort_at_quantile stops completions on their way, and those of {without_credentials(source)} come whole: "
            "take a model in this process (a name or a directory), or a smaller max_tokens"
        )


def settled(settings: SampleSettings, runs: Path) -> SampleSettings:
    """With a folder: the one given, else one that all runs with the same settings share."""
    if settings.out is not None:
        return settings
    content = {key: value for key, value in settings.as_dict().items() if key not in _ELSEWHERE}
    digest = hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=4).hexdigest()
    name = without_credentials(settings.generator).partition("?")[0].rstrip("/").split("/")[-1]
    name = re.sub(r"[^\w.-]+", "-", name).strip("-.") or "generator"
    return replace(settings, out=str(runs / "rollouts" / f"{name}-{digest}"))


def rollouts_file(settings: SampleSettings) -> Path:
    """Where the completions will be."""
    assert settings.out is not None
    return Path(settings.out) / "rollouts.jsonl"


def run_sampling(settings: SampleSettings, *, wait: bool = False) -> int:
    """Sample, and say how it went.

    Args:
        settings: with a folder.
        wait: wait where another process samples into the same folder, instead of refusing.

    Returns:
        Exit status: 0 all completions are there, 3 some failed.

    Raises:
        LenVMError: prompts, generator or folder cannot be used.
        SystemExit: SIGTERM; what is done stays.
    """
    from ..rollouts.prompts import load_prompts
    from ..rollouts.sample import already_sampled, open_generator, report, sample_rollouts
    from .longest_first import longest_first, value_model_for

    source, options = settings.generator, {"model": settings.model, **(settings.options or {})}
    with sigterm_exits():
        prompts = load_prompts(
            settings.prompts,
            split=settings.split,
            limit=settings.limit,
            allow_images_from=settings.allow_images_from,
        )
        wanted = prompts, settings.n, rollouts_file(settings).parent, settings.sampling
        share = settings.abort_at_quantile
        lenvm = value_model_for(source, settings.lenvm) if settings.longest_first else None
        outcome = already_sampled(source, *wanted, share, **options)
        if outcome is None:
            generator = open_generator(source, **options)
            order = None if lenvm is None else longest_first(source, lenvm, generator, options)
            outcome = sample_rollouts(generator, *wanted, abort_at_quantile=share, order=order, wait=wait)
    report(outcome)
    return outcome.status


def check_sampling(settings: SampleSettings) -> bool:
    """Say what would be sampled, without loading the generator; whether all of it is there already."""
    from ..rollouts.prompts import load_prompts

    prompts = load_prompts(
        settings.prompts, split=settings.split, limit=settings.limit, allow_images_from=settings.allow_images_from
    )
    file, generator = rollouts_file(settings), without_credentials(settings.generator)
    print(
        f"sample: {settings.n} completions of each of {len(prompts):,} prompts by {generator}, "
        f"{settings.n * len(prompts):,} in all, at most {settings.max_tokens:,} tokens each, into {file.parent}"
        + (" (complete)" if file.exists() else "")
    )
    return file.exists()


def wait_for_first(settings: SampleSettings) -> None:
    """In all processes of a distributed run but the first: wait until that one has sampled."""
    while not rollouts_file(settings).exists():
        time.sleep(1.0)


def release_memory() -> None:
    """Give back what a generator held, so that training can have it."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def sigterm_exits() -> Iterator[None]:
    """Let SIGTERM end the process the ordinary way, so that everything is closed in order."""

    def stop(number: int, frame: Any) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
