"""What the tasks `length` and `tokens` share: completions of the unguided generator, read by a length value model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ...errors import EvaluationError
from ...rollouts.generators.interface import GeneratedText
from ...rollouts.sample import model_of
from ...utils.settings import TEXT, setting
from .. import tiny_world
from ..recorded import Recorded, read_recorded
from ..samples import Sample, System
from ..settings import EvaluationSettings
from ..task import DataSource, Measured, Questions, Task, first_of, prompt_by_id

if TYPE_CHECKING:
    from torch import Tensor

Kept = TypeVar("Kept")
_TINY_SETS = {"tiny-vl": ["tiny-vqa"]}  # of other generators: problems and texts
_TINY_PROMPTS = 60
# As rollouts are sampled: temperature 1 without truncation.
_SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
_OF_SAMPLING = ("data", "systems", "n", *_SAMPLING, "max_tokens", "model", "allow_images_from")


@dataclass(frozen=True)
class ValueSettings:
    """What tasks of this kind can be asked."""

    rollouts: str | None = setting(
        TEXT, "a rollouts.jsonl or its folder whose completions are measured on; nothing is sampled", None
    )


class ValueTask(Task):
    """Prompts as training takes them, and the generator unguided; see `Task`.

    Args:
        n: completions of a prompt.
        n_tiny: the same in the tiny world.
    """

    needs_lenvm = True

    def __init__(self, n: int, n_tiny: int) -> None:
        fewer = {"n": n_tiny, "limit": _TINY_PROMPTS, "max_tokens": 768}
        self.sources = (
            DataSource("tiny", _tiny_questions, {**_SAMPLING, **fewer}, also=tiny_world.PROMPT_SETS, tiny_world=True),
            DataSource("prompts", self._questions, {**_SAMPLING, "n": n, "max_tokens": 5000}),
        )

    def _questions(self, settings: EvaluationSettings) -> Questions:
        """Prompts that were not trained on, as far as their source says.

        Raises:
            EvaluationError: none are named.
        """
        from ...rollouts.prompts import load_prompts

        if settings.data is None:
            raise EvaluationError("--data is missing: prompts that the length value model was not trained on")
        prompts = load_prompts(
            settings.data,
            split=None if settings.data_is_file else "test",
            allow_images_from=settings.allow_images_from,
        )
        return Questions(first_of(prompts, settings.limit), len(prompts), prompts.description)

    def recorded(self, settings: EvaluationSettings) -> Recorded | None:
        """The rollouts that are named, held-out ones where they say which; None where none are.

        Raises:
            EvaluationError: they cannot be measured on, or settings say how to sample.
            DataError: they cannot be read.
        """
        own: ValueSettings = settings.own
        if own.rollouts is None:
            return None
        idle = [f"--{name.replace('_', '-')}" for name in _OF_SAMPLING if getattr(settings, name) is not None]
        if idle:
            raise EvaluationError(f"--rollouts names completions that are there: {', '.join(idle)} would do nothing")
        return read_recorded(Path(own.rollouts), settings.limit)

    def systems(self, settings: EvaluationSettings, names: Sequence[str]) -> list[System]:
        """Return the unguided generator: lengths under a control are another matter."""
        if list(names) != ["base"]:
            raise EvaluationError(f"{self.name} measures completions of `base` alone, found {list(names)}")
        return [System("base")]

    def judge(self, meta: Mapping[str, Any], completion: GeneratedText) -> dict[str, Any]:
        """Return nothing: there is no right and wrong."""
        return {}


def _tiny_questions(settings: EvaluationSettings) -> Questions:
    """Prompts of the tiny world that no tiny model has seen: of one set, or as many of each that fits the generator."""
    from ...rollouts.prompts import load_prompts

    fitting = _TINY_SETS.get(model_of(settings.generator or ""), ["tiny-math", "tiny-write"])
    names = fitting if settings.data is None else [str(settings.data)]
    limit = settings.limit or _TINY_PROMPTS
    sources: list[str | dict[str, Any]] = []
    for place, name in enumerate(names):
        share = (limit + place) // len(names)
        if share:
            sources.append({"source": name, "seed": 1, "limit": share})
    prompts = load_prompts(sources, split="test")
    return Questions(prompts, _TINY_PROMPTS, prompts.description)


def read_states(measured: Measured, keep: "Callable[[Tensor], Kept]") -> "Iterator[tuple[Sample, Kept]]":
    """Samples with what is predicted at their states, in the order of the samples.

    Args:
        measured: samples and length value model.
        keep: what to keep of the outputs of all heads at the states of a sample, (L + 1, 1 + K): all samples are held.

    Raises:
        EvaluationError: a prompt that the length value model cannot read.
    """
    samples = [sample for sample in measured.samples["base"] if sample.token_ids]
    prompt_of = prompt_by_id(measured)

    from ...inspection.rollout_values import values_of

    assert measured.lenvm is not None
    pairs = ((prompt_of(sample.prompt_id), sample.token_ids) for sample in samples)
    found: dict[int, Kept] = {}
    for number, outputs in values_of(measured.lenvm, measured.processor, pairs, all_heads=True):
        if isinstance(outputs, str):
            raise EvaluationError(f"prompt {samples[number].prompt_id!r} cannot be read: {outputs}")
        found[number] = keep(outputs)
    # In the order of the samples, so that sums do not depend on how they were batched.
    yield from ((samples[number], found[number]) for number in sorted(found))
