"""What is to be done, known before any model is loaded: task, data source, systems, questions, sampling."""

import hashlib
import json
import re
from dataclasses import dataclass, replace
from typing import Any

from ..decoding.sampling_params import SamplingParams
from ..errors import EvaluationError
from ..models import embedded
from ..rollouts.sample import is_server, is_vllm, model_of
from . import tasks
from .recorded import Recorded
from .samples import System
from .settings import WHERE, EvaluationSettings, filled
from .task import DataSource, Questions, Task

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "max_tokens", "seed")


@dataclass(frozen=True)
class Prepared:
    """An evaluation that can begin.

    Attributes:
        task: which.
        settings: with the protocol of the data source filled in.
        source: where the questions come from.
        questions: what is asked.
        systems: who answers, in the order in which they are measured.
        sampling: how tokens are sampled, what single systems change apart.
        generator: embedded name, directory, hub id, ``vllm:`` before one of these, or address.
        server: True = the generator is the address of a server, which decodes by itself.
        tiny_world: True = questions or generator are of the tiny world.
        tokenizer: where the tokenizer of the questions is; None: with the length value model.
        recorded: completions that are measured on instead of sampling; None where the generator is asked.
    """

    task: Task
    settings: EvaluationSettings
    source: DataSource
    questions: Questions
    systems: list[System]
    sampling: SamplingParams
    generator: str
    server: bool
    tiny_world: bool
    tokenizer: str | None = None
    recorded: Recorded | None = None

    @property
    def generator_options(self) -> dict[str, Any]:
        """Arguments of the generator."""
        given = self.settings
        if self.server:
            own: dict[str, Any] = {"model": given.model}
            own |= {"gamma": given.gamma} if given.in_research_words else {}
        elif is_vllm(self.generator):
            own = {"dtype": given.dtype}
            if any(system.guided for system in self.systems):
                own |= {"lenvm": given.lenvm, "gamma": given.gamma}
        else:
            own = {"dtype": given.dtype, "device": given.device}
        return {**{key: value for key, value in own.items() if value is not None}, **(given.options or {})}


def prepare(settings: EvaluationSettings) -> Prepared:
    """Look at what is asked, and at the data; nothing is loaded onto a device and no server is reached.

    Raises:
        EvaluationError: settings that contradict each other.
        DataError: data that are not there or cannot be read.
    """
    # 1. Task and models.
    task = tasks.get(settings.task)
    assert isinstance(task, Task), f"{settings.task} asks no questions"
    recorded = task.recorded(settings)
    generator = settings.generator or (recorded.generator or "unknown" if recorded else task.generator)
    lenvm = settings.lenvm or embedded.value_model_of(model_of(generator))
    # 2. The data source, and its protocol where nobody said otherwise.
    source = _source_of(recorded) if recorded else task.source_of(settings.data, model_of(generator))
    data = None if settings.data == source.name else settings.data
    given = replace(settings, generator=generator, lenvm=lenvm, data=data)
    complete = filled(given, source.defaults)
    # 3. Systems: guided ones need somebody who guides them.
    server = is_server(generator)
    guided = lenvm is not None or given.guides_by_itself
    systems = task.systems(complete, task.system_names(given, source, guided))
    _check_guidance(task, complete, systems, server, guided)
    # 4. Questions and sampling.
    questions = source.load(complete)
    max_tokens = complete.max_tokens or task.default_max_tokens(complete)
    return Prepared(
        task=task,
        settings=complete,
        source=source,
        questions=questions,
        systems=[_with_given_sampling(system, given) for system in systems],
        sampling=_sampling(complete, max_tokens),
        generator=generator,
        server=server,
        tiny_world=source.tiny_world or embedded.wrote(model_of(generator)),
        tokenizer=_tokenizer_of(settings, generator, recorded),
        recorded=recorded,
    )


def _source_of(recorded: Recorded) -> DataSource:
    """Prompts of rollouts that are there."""
    questions = Questions(recorded.prompts, recorded.of, {"rollouts": recorded.description})
    return DataSource("rollouts", lambda settings: questions, {"max_tokens": recorded.max_tokens})


def _tokenizer_of(settings: EvaluationSettings, generator: str, recorded: Recorded | None) -> str | None:
    """Where the tokenizer of the questions is; None: with the length value model, as that of servers' models is."""
    if is_server(generator):
        return None
    if recorded is not None and settings.generator is None:
        return recorded.tokenizer
    return model_of(generator)


def _check_guidance(
    task: Task, settings: EvaluationSettings, systems: list[System], server: bool, guided: bool
) -> None:
    """Refuse systems that nobody could guide.

    Raises:
        EvaluationError: a length value model is missing, or stands beside a server.
    """
    wanting = ", ".join(system.name for system in systems if system.guided)
    if wanting and not guided and not server:
        raise EvaluationError(f"{wanting}: --lenvm is missing, a length value model of the same vocabulary")
    told = ", ".join(system.name for system in systems if system.rival and system.rival.kind == "feedback")
    if told and server:
        raise EvaluationError(f"{told}: a server cannot be told something in the middle of an answer")
    if task.needs_lenvm and settings.lenvm is None:
        raise EvaluationError(f"{task.name} measures a length value model: --lenvm is missing")
    if wanting and server and (settings.lenvm is not None or not guided):
        raise EvaluationError(
            f"{wanting}: a server decodes by itself, without --lenvm; one that has a length value model takes "
            "--options '{server: lenvm}' (`lenvm serve`), '{server: vllm-lenvm}' or '{server: research}' instead"
        )


def _with_given_sampling(system: System, given: EvaluationSettings) -> System:
    """What was given for all systems holds for those too that would differ in it."""
    kept = {name: value for name, value in system.sampling.items() if getattr(given, name) is None}
    return replace(system, sampling=kept)


def _sampling(settings: EvaluationSettings, max_tokens: int) -> SamplingParams:
    values = {name: getattr(settings, name) for name in _SAMPLING} | {"max_tokens": max_tokens}
    return SamplingParams(**{name: value for name, value in values.items() if value is not None})


def identity_of(prepared: Prepared, generator: dict[str, Any] | None) -> dict[str, Any]:
    """All that decides what is measured, JSON values.

    Args:
        prepared: what is to be done.
        generator: fingerprint of a server; None for a local one, whose files are looked at.
    """
    from ..rollouts.generators.vllm import deciding_options

    given = prepared.settings
    left_out = (*WHERE, "compare", "model", "rollouts")  # which rollouts, the questions say
    settings = {key: value for key, value in given.as_dict().items() if key not in left_out}
    # They do not decide what is asked, but every token and number; what is usual goes without saying.
    dtype = given.dtype or (given.options or {}).get("dtype") or _usual_dtype(prepared)
    settings |= {"dtype": dtype} if dtype != "float32" else {}
    processor = (given.options or {}).get("processor")
    settings |= {"processor": processor} if processor else {}
    if is_vllm(prepared.generator) and (deciding := deciding_options(given.options or {})):
        settings |= {"engine_options": deciding}
    if given.guides_by_itself and not given.in_research_words:  # each kind has controls of its own
        settings |= {"server": (given.options or {})["server"]}
    return {
        "task_version": prepared.task.version,
        **settings,
        "source": prepared.source.name,
        "systems": [system.name for system in prepared.systems],
        "generator": generator or _generator_of(prepared),
        "lenvm": _model(given.lenvm) if given.lenvm else None,
        "questions": prepared.questions.description,
    }


def _generator_of(prepared: Prepared) -> dict[str, Any]:
    """A generator in this process, and who runs it where that is not usual; of rollouts, who they say wrote them."""
    generator = prepared.generator
    if prepared.recorded is not None:
        return {"name": generator}
    told = _model(model_of(generator))
    return {**told, "run_by": "vllm"} if is_vllm(generator) else told


def _model(source: str) -> dict[str, Any]:
    from ..rollouts.generators.local.loading import digest, name_of

    return {"name": name_of(source), "digest": digest(source)[:16]}


def _usual_dtype(prepared: Prepared) -> str:
    """The dtype of the generator where none was given.

    ``float32`` where it is not known, of a server's and of that of rollouts; vLLM's own.
    """
    from ..models.backbone import load_config
    from ..models.dtypes import usual_dtype
    from ..rollouts.generators.local.loading import place_for

    if prepared.server or prepared.recorded is not None:
        return "float32"
    if is_vllm(prepared.generator):
        return "auto"
    trusted = prepared.generator_options.get("trust_remote_code", False)
    config = load_config(prepared.generator, trust_remote_code=trusted)
    return usual_dtype(config, place_for(prepared.settings.device))


def name_of_folder(task: str, identity: dict[str, Any]) -> str:
    """Name of the folder of the results: other settings have another one."""
    told = json.dumps(identity, sort_keys=True).encode()
    last_part = str(identity["generator"]["name"]).rstrip("/").split("/")[-1]
    generator = re.sub(r"[^\w.-]+", "-", last_part).strip("-.")
    return f"{task}-{generator}-{hashlib.blake2b(told, digest_size=4).hexdigest()}"
