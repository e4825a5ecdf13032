"""What a task is: questions, systems, judging, and what is made of the samples."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torch.utils.data import Subset

from ..rollouts.generators.interface import GeneratedText, Prompt
from .results import Table
from .samples import Sample, System
from .settings import EvaluationSettings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..models.value_model import LengthValueModel


@dataclass(frozen=True)
class Questions:
    """What a task asks.

    Attributes:
        prompts: the questions; ``meta`` has what judging needs.
        of: how many there are; in the tiny world, so many as are asked without a limit.
        description: where they come from and a digest of their content, JSON values.
        guided: the same questions as guided systems are asked; None where there is no difference.
    """

    prompts: Sequence[Prompt]
    of: int | None
    description: dict[str, Any]
    guided: Sequence[Prompt] | None = None


@dataclass(frozen=True)
class Measured:
    """What there is to summarise.

    Attributes:
        settings: of the task.
        systems: that were measured, in order.
        samples: of each, by its name.
        prompts: the questions.
        lenvm: the length value model; None where there is none.
        processor: of the generator; None behind a server.
        notice: for the titles of plots: ``tiny world``, or empty.
    """

    settings: EvaluationSettings
    systems: list[System]
    samples: dict[str, list[Sample]]
    prompts: Sequence[Prompt]
    lenvm: "LengthValueModel | None" = None
    processor: Any = None
    notice: str = ""


@dataclass(frozen=True)
class Findings:
    """Tables, points of the plots, and the plots by the name of their file."""

    tables: list[Table]
    curves: dict[str, Any] = field(default_factory=dict)
    figures: "dict[str, Figure]" = field(default_factory=dict)


def digest(content: Any) -> str:
    """Return what tells JSON values from others."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def ids_of(prompts: Any) -> list[str]:
    """The ids of prompts, without opening their pictures where that can be helped."""
    if isinstance(prompts, Subset):
        every = ids_of(prompts.dataset)
        return [every[index] for index in prompts.indices]
    return list(getattr(prompts, "ids", None) or [prompt.prompt_id for prompt in prompts])


class Task(Protocol):
    """One task.

    Attributes:
        version: counted up whenever the same samples would give other numbers.
        needs_lenvm: True = it measures a length value model, and cannot do without one.
    """

    version: int
    needs_lenvm: bool

    def defaults(self, tiny: bool) -> dict[str, Any]:
        """Return the protocol: settings that hold where none are given; ``tiny`` = in the tiny world."""

    def questions(self, settings: EvaluationSettings, tiny: bool) -> Questions:
        """Return what is asked.

        Raises:
            LenVMError: data that are not there or cannot be read.
        """

    def systems(self, settings: EvaluationSettings, guided: bool, tiny: bool) -> list[System]:
        """Return what is measured; ``guided`` = there is a length value model."""

    def judge(self, meta: Mapping[str, Any], completion: GeneratedText) -> dict[str, Any]:
        """Return what is to be remembered of a completion."""

    def summarise(self, measured: Measured) -> Findings:
        """Return tables and plots."""
