"""One evaluation: settings -> questions -> samples of every system -> findings -> report."""

import hashlib
import importlib.metadata
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .. import __version__, tinyworld
from ..decoding.sampling_params import SamplingParams
from ..errors import EvaluationError
from ..models import embedded
from ..rollouts.generators.interface import Generator
from ..rollouts.generators.local.loading import require_same_tokens
from ..rollouts.prompting import tokenizer_of
from ..rollouts.sample import is_server, open_generator
from ..utils.locked_folder import FolderLock, differences
from .report import write_report
from .results import Results
from .samples import Sample, SampleFolder, System, collect
from .settings import WHERE, WITHOUT_GENERATOR, EvaluationSettings
from .task import Findings, Measured, Questions, Task, digest
from .tasks.accuracy_at_budget import BudgetTask
from .tasks.compare_runs import ablation, scaling
from .tasks.length_and_tokens import LengthTask, TokensTask
from .tasks.lifebench_task import WishTask

_TASKS: dict[str, Task] = {
    "lifebench": WishTask(),
    "gsm8k": BudgetTask("gsm8k", "gsm8k"),
    "math500": BudgetTask("math500", "math500"),
    "vqa": BudgetTask("vqa", "mathvista", "mathvision"),
    "length": LengthTask(),
    "tokens": TokensTask(),
}
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "max_tokens", "seed")


@dataclass(frozen=True)
class Evaluated:
    """How it ended.

    Attributes:
        folder: where everything is.
        results: what was found.
        text: the report.
    """

    folder: Path
    results: Results
    text: str

    @property
    def status(self) -> int:
        """Exit status: 0 every completion is there, 3 some failed."""
        return 3 if self.results.failed else 0


def evaluate(settings: EvaluationSettings, root: Path = Path("results"), command: str = "") -> Evaluated:
    """Measure; goes on where an earlier call with the same settings stopped, and only tells where it is complete.

    Args:
        settings: of one task.
        root: where the folder goes, unless the settings name one.
        command: what was typed, for the report.

    Raises:
        LenVMError: settings that contradict each other, data or models that cannot be read, a generator that stopped.
    """
    if settings.task in WITHOUT_GENERATOR:
        return _evaluate_runs(settings, root, command)
    plan = _Plan(settings)
    folder = Path(settings.out) if settings.out else root / plan.name
    found = _complete(folder, plan)
    if found is not None:
        return found
    with SampleFolder(folder, plan.identity) as samples:
        for note in samples.notes:
            print(f"{folder}: {note}", file=sys.stderr)
        if samples.samples:
            print(f"{folder}: going on from {len(samples.samples):,} samples", file=sys.stderr)
        models = _Models(plan)
        models.lenvm()  # one that cannot be loaded is told before base is sampled for hours
        speeds = {}
        for system in plan.systems:
            speed = collect(
                samples,
                models.generator_for(system),
                system,
                plan.prompts_for(system),
                plan.settings.n or 1,
                plan.sampling,
                plan.task.judge,
            )
            if speed is not None:
                speeds[system.name] = speed
        by_system = {system.name: samples.of(system.name) for system in plan.systems}
        if not any(by_system.values()):
            reasons = sorted({failure.reason for failure in samples.failures.values()})
            raise EvaluationError(f"{folder}: not one completion could be had:\n  " + "\n  ".join(reasons[:10]))
        _tell_failed(samples)
        findings = plan.task.summarise(models.measured(by_system))
        results = _results(plan, findings, by_system, len(samples.failures), models.gamma)
        text = write_report(folder, results, findings.figures, speeds, command)
    return Evaluated(folder, results, text)


def check(settings: EvaluationSettings) -> None:
    """Look at what an evaluation would do, without models: its systems, and that its data are there.

    Raises:
        LenVMError: settings that contradict each other, data that cannot be read.
    """
    if settings.task not in WITHOUT_GENERATOR:
        _Plan(settings, only_look=True)


def _evaluate_runs(settings: EvaluationSettings, root: Path, command: str) -> Evaluated:
    """Compare finished runs; that takes no time, so it is done anew every time."""
    if settings.task == "paper":
        raise EvaluationError("the task `paper` belongs into a recipe with other tasks, see recipes/paper_tiny.yaml")
    if not settings.runs:
        raise EvaluationError(f"{settings.task}: --runs is missing, folders of finished runs such as runs/text_lenvm")
    findings, tiny = {"scaling": scaling, "ablation": ablation}[settings.task](settings.runs)
    results = Results(
        task=settings.task,
        task_version=1,
        tiny_world=tiny,
        questions=0,
        questions_of=None,
        completions=0,
        failed=0,
        provenance={"runs": settings.runs, "versions": _versions()},
        tables=findings.tables,
        curves=findings.curves,
    )
    folder = Path(settings.out) if settings.out else root / f"{settings.task}-{digest(settings.runs)[:8]}"
    with FolderLock(folder):
        text = write_report(folder, results, findings.figures, {}, command)
    return Evaluated(folder, results, text)


class _Plan:
    """What is to be done, known before any model is loaded.

    Attributes:
        task: which.
        settings: with the task's protocol filled in.
        tiny: True = questions of the tiny world.
        questions: what is asked.
        systems: who answers.
        identity: all that decides what is measured, JSON values.
    """

    def __init__(self, settings: EvaluationSettings, only_look: bool = False) -> None:
        self.task = _TASKS[settings.task]
        embedded = settings.generator is None or settings.generator in tinyworld.NAMES
        self.tiny = settings.data in ("tiny", *tinyworld.PROMPT_SETS) or (settings.data is None and embedded)
        generator = settings.generator or ("tiny-vl" if settings.task == "vqa" else "tiny-text")
        of_embedded = {value: key for key, value in tinyworld.VALUE_MODELS.items()}
        settings = replace(settings, generator=generator, lenvm=settings.lenvm or of_embedded.get(generator))
        defaults = self.task.defaults(self.tiny)
        unset = {key: value for key, value in defaults.items() if getattr(settings, key) is None}
        self.settings = settings = replace(settings, **unset)
        self.server = is_server(generator)
        self.guided = settings.lenvm is not None or (settings.options or {}).get("server") == "research"
        self.systems = self.task.systems(settings, self.guided, self.tiny)
        self._check()
        self._check_data()
        self.questions: Questions = self.task.questions(settings, self.tiny)
        self.sampling = _sampling(settings, self.systems)
        self.generator: Generator | None = None
        if only_look:
            return
        if self.server:
            self.generator = open_generator(generator, **self.options)
            self._check_controls()
        self.identity = self._identity()

    def _check_controls(self) -> None:
        """Refuse controls that the server does not take, before anything is asked of it."""
        meta = next(iter(self.questions.prompts)).meta
        for system in self.systems:
            if system.control is not None:
                control = system.control(meta)
                self.generator.check(control, replace(self.sampling, **system.drawing))  # type: ignore[union-attr]

    def _check(self) -> None:
        """Refuse systems that nobody could guide, before anything is loaded."""
        lenvm = self.settings.lenvm
        wanting = ", ".join(system.name for system in self.systems if system.guided)
        if wanting and not self.guided and not self.server:
            raise EvaluationError(f"{wanting}: --lenvm is missing, a length value model of the same vocabulary")
        if self.task.needs_lenvm and lenvm is None:
            raise EvaluationError(f"{self.settings.task} measures a length value model: --lenvm is missing")
        if wanting and self.server and (lenvm is not None or not self.guided):
            raise EvaluationError(
                f"{wanting}: a server decodes by itself, without --lenvm; one that knows length value models takes "
                "--options '{server: research}' instead"
            )

    def _check_data(self) -> None:
        """Refuse data and languages that this task would not look at in the tiny world."""
        data, name = self.settings.data, self.settings.task
        every = tinyworld.PROMPT_SETS
        own = {"lifebench": (), "vqa": ("tiny-vqa",), "length": every, "tokens": every}.get(name, ("tiny-math",))
        if self.tiny and data not in (None, "tiny", *own):
            raise EvaluationError(
                f"--data: {name} asks no {data}; in the tiny world it takes {', '.join(('tiny', *own))}"
            )
        if self.tiny and self.settings.languages not in (None, ["en"]):
            raise EvaluationError("--languages: the tiny world writes English only; give --data for other items")

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of the generator."""
        given = self.settings
        own: dict[str, Any] = {"model": given.model} if self.server else {"dtype": given.dtype, "device": given.device}
        if self.server and (given.options or {}).get("server") == "research":
            own["gamma"] = given.gamma
        return {**{key: value for key, value in own.items() if value is not None}, **(given.options or {})}

    @property
    def name(self) -> str:
        """Of its folder: other settings have another one."""
        told = json.dumps(self.identity, sort_keys=True).encode()
        generator = re.sub(r"[^\w.-]+", "-", str(self.identity["generator"]["name"]).rstrip("/").split("/")[-1]).strip(
            "-."
        )
        return f"{self.settings.task}-{generator}-{hashlib.blake2b(told, digest_size=4).hexdigest()}"

    def prompts_for(self, system: System) -> Any:
        """The questions as a system is asked them."""
        other = self.questions.guided
        return other if system.guided and other is not None else self.questions.prompts

    def _identity(self) -> dict[str, Any]:
        from ..rollouts.generators.local.loading import digest as digest_of_model
        from ..rollouts.generators.local.loading import name_of, place_for

        def model(source: str) -> dict[str, Any]:
            return {"name": name_of(source), "digest": digest_of_model(source)[:16]}

        given = self.settings
        assert given.generator is not None
        settings = {key: value for key, value in asdict(given).items() if key not in (*WHERE, "compare", "model")}
        # They do not decide what is asked, but every token and number; what is usual goes without saying.
        dtype = given.dtype or ("auto" if not self.server and place_for(given.device).type != "cpu" else "float32")
        settings |= {"dtype": dtype} if dtype != "float32" else {}
        processor = (given.options or {}).get("processor")
        settings |= {"processor": processor} if processor else {}
        return {
            "task_version": self.task.version,
            **settings,
            "systems": [system.name for system in self.systems],
            "generator": self.generator.fingerprint() if self.generator else model(given.generator),
            "lenvm": model(given.lenvm) if given.lenvm else None,
            "questions": self.questions.description,
        }


def _sampling(settings: EvaluationSettings, systems: list[System]) -> SamplingParams:
    """How tokens are drawn; what was given for all systems holds for those that would differ too."""
    given = {name: getattr(settings, name) for name in _SAMPLING}
    if given["max_tokens"] is None:
        given["max_tokens"] = 3 * max(settings.lengths or [512])
    if given["min_p"] is not None:
        systems[:] = [
            replace(system, drawing={k: v for k, v in system.drawing.items() if k != "min_p"}) for system in systems
        ]
    return SamplingParams(**{name: value for name, value in given.items() if value is not None})


class _Models:
    """The generator and the length value model, loaded when they are needed first."""

    def __init__(self, plan: _Plan) -> None:
        self._plan = plan
        self._generator = plan.generator
        self._lenvm: Any = None
        self.gamma: float | None = plan.settings.gamma

    def generator_for(self, system: System) -> Generator:
        """The generator, with a length value model where the system is guided."""
        if self._generator is None:
            assert self._plan.settings.generator is not None
            self._generator = open_generator(self._plan.settings.generator, **self._plan.options)
            if self._plan.settings.lenvm is not None:
                tokenizer = tokenizer_of(self._generator.processor)  # type: ignore[attr-defined]
                require_same_tokens(tokenizer, self._plan.settings.lenvm)
        if not self._plan.server:
            self._generator.lenvm = self.lenvm() if system.guided else None  # type: ignore[attr-defined]
        return self._generator

    def lenvm(self) -> Any:
        """The length value model; None where there is none."""
        source = self._plan.settings.lenvm
        if self._lenvm is None and source is not None:
            from ..models.value_model import LengthValueModel
            from ..rollouts.generators.local.loading import place_for

            settings = self._plan.settings
            device = place_for(settings.device, settings.dtype)
            dtype = settings.dtype or ("auto" if device.type == "cuda" else "float32")
            model = LengthValueModel.from_pretrained(source, gamma=settings.gamma, dtype=dtype)
            self._lenvm = model.to(device).eval()
            self.gamma = self._lenvm.gamma
        return self._lenvm

    def measured(self, samples: dict[str, list[Sample]]) -> Measured:
        """What the task makes its tables of."""
        plan = self._plan
        lenvm = self.lenvm()
        processor = None
        if plan.task.needs_lenvm:
            processor = getattr(self._generator, "processor", None)
            if processor is None:
                from ..models.processors import load_processor

                # A server's model writes in the vocabulary of the length value model.
                source = plan.settings.lenvm if plan.server else plan.settings.generator
                processor = load_processor((plan.settings.options or {}).get("processor") or source or "")
        notice = "tiny world" if _is_tiny(plan) else ""
        return Measured(plan.settings, plan.systems, samples, plan.questions.prompts, lenvm, processor, notice)


def _is_tiny(plan: _Plan) -> bool:
    return plan.tiny or embedded.wrote(plan.settings.generator or "")


def _complete(folder: Path, plan: _Plan) -> Evaluated | None:
    """What was found before, where that is all there is to find."""
    try:
        old = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        results = Results.from_dict(json.loads((folder / "results.json").read_text(encoding="utf-8")))
        if differences(old, json.loads(json.dumps(plan.identity))) or results.failed:
            return None
        text = (folder / "report.md").read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        print(f"{folder}: its results cannot be read ({error}) and are made again", file=sys.stderr)
        return None
    print(f"{folder} is complete for these settings.", file=sys.stderr)
    return Evaluated(folder, results, text)


def _tell_failed(samples: SampleFolder) -> None:
    """List the completions that could not be had."""
    file = samples.folder / "failures.jsonl"
    if not samples.failures:
        file.unlink(missing_ok=True)
        return
    lines = [
        json.dumps({"system": key[0], "prompt_id": key[1], "number": key[2], "reason": failure.reason})
        for key, failure in sorted(samples.failures.items())
    ]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    reasons = sorted({failure.reason for failure in samples.failures.values()})
    print(
        f"{len(lines):,} completions failed, all listed in {file}; such as: {reasons[0]}\n"
        "The same command tries them again.",
        file=sys.stderr,
    )


def _results(
    plan: _Plan, findings: Findings, samples: Mapping[str, list[Sample]], failed: int, gamma: float | None
) -> Results:
    sampling = plan.sampling.as_dict()
    seed = sampling.pop("seed")
    return Results(
        task=plan.settings.task,
        task_version=plan.task.version,
        tiny_world=_is_tiny(plan),
        questions=len(plan.questions.prompts),
        questions_of=plan.questions.of,
        completions=sum(map(len, samples.values())),
        failed=failed,
        provenance={
            "generator": plan.identity["generator"],
            "lenvm": plan.identity["lenvm"],
            "gamma": gamma,
            "seed": seed,
            "completions_per_question": plan.settings.n,
            "sampling": sampling,
            "dtype": None if plan.server else plan.identity.get("dtype", "float32"),
            "systems": {system.name: dict(system.drawing) for system in plan.systems},
            "questions": plan.questions.description,
            "versions": _versions(),
        },
        tables=findings.tables,
        curves=findings.curves,
    )


def _versions() -> dict[str, str]:
    names = ("torch", "transformers", "lightning", "math-verify")
    return {"lenvm-lightning": __version__, **{name: importlib.metadata.version(name) for name in names}}
