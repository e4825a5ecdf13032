"""What a task is: named data sources, systems, judging, and what is made of the samples."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ..decoding.sampling_params import SamplingParams
from ..errors import EvaluationError
from ..models import embedded
from ..rollouts.generators.interface import GeneratedText, Prompt
from . import tiny_world
from .recorded import Recorded
from .results import Results, Table
from .samples import Sample, System
from .settings import EvaluationSettings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..models.value_model import LengthValueModel


@dataclass(frozen=True)
class Questions:
    """What a task asks.

    Attributes:
        prompts: the questions; `meta` has what judging needs.
        of: how many there are; in the tiny world, so many as are asked without a limit.
        description: where they come from and a digest of their content, JSON values.
        guided: the same questions as guided systems are asked; None where there is no difference.
    """

    prompts: Sequence[Prompt]
    of: int | None
    description: dict[str, Any]
    guided: Sequence[Prompt] | None = None


@dataclass(frozen=True)
class DataSource:
    """Where questions come from, and the protocol that holds for them.

    Attributes:
        name: what `--data` calls it.
        load: makes the questions of settings whose defaults are filled in; raises `LenVMError` for data that are not
            there or cannot be read.
        defaults: settings that hold where none are given, those of the task included.
        systems: names of the systems that are measured where there is a length value model and nobody chose.
        compared: the same under `--compare`.
        also: other names that `--data` may call it by.
        tiny_world: True = the questions are made by the tiny world.
    """

    name: str
    load: Callable[[EvaluationSettings], Questions]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    systems: tuple[str, ...] = ("base",)
    compared: tuple[str, ...] = ("base",)
    also: tuple[str, ...] = ()
    tiny_world: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """All that `--data` may call it."""
        return (self.name, *self.also)


@dataclass(frozen=True)
class Measured:
    """What there is to summarise.

    Attributes:
        settings: of the task, defaults filled in.
        systems: that were measured, in order.
        samples: of each, by its name.
        prompts: the questions.
        lenvm: the length value model; None where there is none.
        processor: of the generator; None behind a server.
        notice: for the titles of plots: `tiny world`, or empty.
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


@dataclass(frozen=True)
class NoSettings:
    """Of a task that has no settings of its own."""


class Task:
    """A task that asks questions. Subclasses set the attributes and write the methods that raise here.

    Attributes:
        name: what people type.
        version: counted up whenever the same samples would give other numbers.
        settings: dataclass of the settings that it alone has, its fields made by `utils.settings.setting`.
        generator: the embedded generator that is measured where none is named.
        needs_lenvm: True = it measures a length value model, and cannot do without one.
        research_systems: measured at a server of the research code, which knows the paper's controls alone, where
            nobody chose; empty = those of other generators.
        sources: where questions may come from; the last one takes files, folders and hub ids.
    """

    name: str
    version = 1
    settings: type = NoSettings
    generator = "tiny-text"
    needs_lenvm = False
    research_systems: tuple[str, ...] = ()
    sources: tuple[DataSource, ...]

    def source_of(self, data: Any, generator: str) -> DataSource:
        """The data source that is asked: the tiny world's for embedded generators where nobody says otherwise.

        Args:
            data: setting of that name.
            generator: who is measured.

        Raises:
            EvaluationError: data of the tiny world that this task does not ask.
        """
        of_tiny_world = data == tiny_world.NAME or data in tiny_world.PROMPT_SETS
        of_tiny_world |= data is None and generator in embedded.generators()
        others = []
        for source in self.sources:
            if not source.tiny_world:
                others.append(source)
            elif of_tiny_world and data not in (None, *source.names):
                known = ", ".join(source.names)
                raise EvaluationError(f"--data: {self.name} asks no {data}; in the tiny world it takes {known}")
            elif of_tiny_world:
                return source
        named = [source for source in others if isinstance(data, str) and data in source.names]
        return (named or others or list(self.sources))[-1]

    def recorded(self, settings: EvaluationSettings) -> Recorded | None:
        """Rollouts that are measured on instead of samples; None where the generator is asked.

        Raises:
            LenVMError: they cannot be read, or other settings contradict them.
        """
        return None

    def system_names(self, settings: EvaluationSettings, source: DataSource, guided: bool) -> Sequence[str]:
        """Names of the systems that are measured.

        Args:
            settings: `systems` and `compare` are used.
            source: its protocol names those that are measured where nobody chose.
            guided: True = there is a length value model.
        """
        if settings.systems:
            return settings.systems
        if self.research_systems and settings.in_research_words:
            return self.research_systems
        if not guided:
            return ("base",)
        return source.compared if settings.compare else source.systems

    def systems(self, settings: EvaluationSettings, names: Sequence[str]) -> list[System]:
        """The systems of these names, in the order in which they are measured.

        Raises:
            EvaluationError: names that mean nothing here.
        """
        raise NotImplementedError

    def default_max_tokens(self, settings: EvaluationSettings) -> int:
        """Tokens after which completions are truncated where neither settings nor source say."""
        return SamplingParams().max_tokens

    def prompts_for(
        self,
        system: System,
        settings: EvaluationSettings,
        questions: Questions,
        done: Mapping[str, list[Sample]],
    ) -> Sequence[Prompt]:
        """The questions as a system is asked them.

        Args:
            system: who is asked next.
            settings: of the task, defaults filled in.
            questions: of the data source.
            done: samples that are there, by system: those measured before it are complete.
        """
        if system.guided and questions.guided is not None:
            return questions.guided
        return questions.prompts

    def judge(self, meta: Mapping[str, Any], completion: GeneratedText) -> dict[str, Any]:
        """What is to be remembered of a completion, JSON values.

        Args:
            meta: of its prompt.
            completion: what was written.

        Raises:
            EvaluationError: nobody could judge it.
        """
        raise NotImplementedError

    def summarise(self, measured: Measured) -> Findings:
        """Tables and plots."""
        raise NotImplementedError


class RunTask:
    """A task that compares finished training runs and samples nothing.

    Attributes:
        name: what people type.
        version: counted up whenever the same runs would give other numbers.
        settings: dataclass of its own settings.
    """

    name: str
    version = 1
    settings: type = NoSettings

    def compare(self, settings: EvaluationSettings) -> tuple[Findings, dict[str, Any], bool]:
        """Compare runs.

        Returns:
            What was found, what it was found in (for the provenance), and whether it is of the tiny world.

        Raises:
            LenVMError: no runs, or runs that cannot be compared.
        """
        raise NotImplementedError

    def digest_of(self, settings: EvaluationSettings) -> str:
        """What tells this comparison from others, for the name of its folder."""
        return digest(settings.as_dict())


class RecipeTask:
    """A task that sums up what the other tasks of a recipe have found.

    Attributes:
        name: what people type.
        settings: dataclass of its own settings.
        recipe: a shipped recipe that has it, for messages.
    """

    name: str
    settings: type = NoSettings
    recipe: str

    def as_markdown(self, results: Sequence[Results], runs: Mapping[str, dict[str, Any]], base: str) -> str:
        """What they amount to, as Markdown.

        Args:
            results: of the other tasks.
            runs: results of training runs, by folder name.
            base: name of the run that the others are variants of.
        """
        raise NotImplementedError


AnyTask = Task | RunTask | RecipeTask


def digest(content: Any) -> str:
    """Return what tells JSON values from others."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def first_of(prompts: Sequence[Prompt], limit: int | None) -> Sequence[Prompt]:
    """The first prompts, without opening their images; all of them where there is no limit."""
    from torch.utils.data import Subset

    kept: Any = Subset(prompts, range(min(limit or len(prompts), len(prompts))))  # type: ignore[arg-type]
    return kept


def ids_of(prompts: Any) -> list[str]:
    """The ids of prompts, without opening their images where that can be helped."""
    from torch.utils.data import Subset

    if isinstance(prompts, Subset):
        every = ids_of(prompts.dataset)
        return [every[index] for index in prompts.indices]
    return list(getattr(prompts, "ids", None) or [prompt.prompt_id for prompt in prompts])


def prompt_by_id(measured: Measured) -> Callable[[str], Prompt]:
    """Finds a prompt; made anew where another was asked for, so that the images of one are held: samples follow so."""
    places = {prompt_id: place for place, prompt_id in enumerate(ids_of(measured.prompts))}
    return lru_cache(maxsize=1)(lambda prompt_id: measured.prompts[places[prompt_id]])
