"""One evaluation: settings -> questions -> samples of every system -> findings -> report."""

import importlib.metadata
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import EvaluationError
from ..rollouts.generators.interface import Prompt
from ..utils.json_input import read_object
from ..utils.locked_folder import FolderLock, differences, full_disk_in_a_sentence
from ..utils.own_folder import claim, refuse_others
from . import tasks
from .asked_prompts import write_prompts
from .models import Models
from .prepare import Prepared, identity_of, name_of_folder, prepare
from .recorded import Recorded
from .report import write_report
from .results import Results
from .samples import Sample, SampleFolder, collect
from .settings import EvaluationSettings
from .task import Findings, Measured, RecipeTask, RunTask, Task

_SHOWN = 10  # reasons in a message


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


@full_disk_in_a_sentence("What is done stays: make room, then type the same command again.")
def evaluate(settings: EvaluationSettings, root: Path = Path("results"), command: str = "") -> Evaluated:
    """Measure; goes on where an earlier call with the same settings stopped, and only tells where it is complete.

    Args:
        settings: of one task, from `read_settings`.
        root: where the folder goes, unless the settings name one.
        command: what was typed, for the report.

    Raises:
        LenVMError: settings that contradict each other, data or models that cannot be read, a generator that stopped,
            a full disk.
    """
    task = tasks.get(settings.task)
    if isinstance(task, RecipeTask):
        raise EvaluationError(
            f"the task `{task.name}` belongs in a recipe with other tasks, see recipes/{task.recipe}.yaml"
        )
    if isinstance(task, RunTask):
        return _compare_runs(task, settings, root, command)
    # 1. Settings -> questions, systems, and what identifies all of it.
    prepared = prepare(settings)
    models = Models(prepared)
    identity = identity_of(prepared, models.connect())
    folder = Path(settings.out) if settings.out else root / name_of_folder(settings.task, identity)
    # 2. What was found before, where that is all there is to find.
    found = _complete(folder, identity)
    if found is not None:
        return found
    with SampleFolder(folder, identity) as samples:
        # 3. Questions -> samples, system by system.
        _tell_opened(samples)
        models.lenvm()  # one that cannot be loaded is told before base is sampled for hours
        speeds = _take(prepared.recorded, samples) if prepared.recorded else _sample(prepared, models, samples)
        by_system = {system.name: samples.of(system.name) for system in prepared.systems}
        _tell_failed(samples)
        if not any(by_system.values()):
            reasons = sorted({failure.reason for failure in samples.failures.values()})
            raise EvaluationError(f"{folder}: not one completion could be had:\n  " + "\n  ".join(reasons[:_SHOWN]))
        # 4. Samples -> findings.
        findings = prepared.task.summarise(_measured(prepared, models, by_system))
        # 5. Findings -> report.
        results = _results(prepared, identity, findings, by_system, len(samples.failures), models.gamma)
        text = write_report(folder, results, findings.figures, speeds, command)
    return Evaluated(folder, results, text)


def check(settings: EvaluationSettings) -> None:
    """Look at what an evaluation would do, without models: its systems, and that its data are there.

    Raises:
        LenVMError: settings that contradict each other, data that cannot be read.
    """
    if isinstance(tasks.get(settings.task), Task):
        prepare(settings)


def _compare_runs(task: RunTask, settings: EvaluationSettings, root: Path, command: str) -> Evaluated:
    """Compare finished runs; that takes no time, so it is done anew every time."""
    findings, compared, tiny_world = task.compare(settings)
    results = Results(
        task=task.name,
        task_version=task.version,
        tiny_world=tiny_world,
        questions=0,
        questions_of=None,
        completions=0,
        failed=0,
        provenance={**compared, "versions": _versions()},
        tables=findings.tables,
        curves=findings.curves,
    )
    folder = Path(settings.out) if settings.out else root / f"{task.name}-{task.digest_of(settings)[:8]}"
    owned = (folder, "comparison", EvaluationError, "Choose another folder (--out).")
    refuse_others(*owned)
    with FolderLock(folder):
        claim(*owned)
        text = write_report(folder, results, findings.figures, {}, command)
    return Evaluated(folder, results, text)


def _sample(prepared: Prepared, models: Models, samples: SampleFolder) -> dict[str, float]:
    """Sample what is missing; tokens a second of each system that was sampled."""
    speeds = {}
    asked: dict[str, Sequence[Prompt]] = {}
    for system in prepared.systems:
        done = {other.name: samples.of(other.name) for other in prepared.systems}
        prompts = prepared.task.prompts_for(system, prepared.settings, prepared.questions, done)
        asked[system.name] = prompts
        generator = models.generator_for(system)
        n = prepared.settings.n or 1
        speed = collect(samples, generator, system, prompts, n, prepared.sampling, prepared.task.judge)
        if speed is not None:
            speeds[system.name] = speed
    write_prompts(samples.folder, asked)
    return speeds


def _take(recorded: Recorded, samples: SampleFolder) -> dict[str, float]:
    """Take completions that are there for samples; nothing was sampled, so there is no speed of it."""
    for sample in recorded.samples:
        if not samples.has(sample.key):
            samples.add(sample)
    write_prompts(samples.folder, {"base": recorded.prompts})
    return {}


def _measured(prepared: Prepared, models: Models, by_system: dict[str, list[Sample]]) -> Measured:
    """What the task makes its tables of."""
    return Measured(
        settings=prepared.settings,
        systems=prepared.systems,
        samples=by_system,
        prompts=prepared.questions.prompts,
        lenvm=models.lenvm(),
        processor=models.processor() if prepared.task.needs_lenvm else None,
        notice="tiny world" if prepared.tiny_world else "",
    )


def _complete(folder: Path, identity: dict[str, Any]) -> Evaluated | None:
    """What was found before with these settings; None where anything is missing, has failed or is broken."""
    try:
        old = read_object(folder / "settings.json")
        results = Results.from_dict(read_object(folder / "results.json"))
        if differences(old, json.loads(json.dumps(identity))) or results.failed:
            return None
        text = (folder / "report.md").read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        print(f"{folder}: its results cannot be read ({error}) and are made again", file=sys.stderr)
        return None
    print(f"{folder} is complete for these settings.", file=sys.stderr)
    return Evaluated(folder, results, text)


def _tell_opened(samples: SampleFolder) -> None:
    """Say what was put right in a folder, and where it goes on."""
    for note in samples.notes:
        print(f"{samples.folder}: {note}", file=sys.stderr)
    if samples.samples:
        print(f"{samples.folder}: going on from {len(samples.samples):,} samples", file=sys.stderr)


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
    prepared: Prepared,
    identity: dict[str, Any],
    findings: Findings,
    samples: Mapping[str, list[Sample]],
    failed: int,
    gamma: float | None,
) -> Results:
    sampling = prepared.sampling.as_dict()
    seed = sampling.pop("seed")
    if any(one.seedless for some in samples.values() for one in some):
        seed = None  # it decided the questions, but not what was answered
    if prepared.recorded is not None:
        seed, sampling = None, prepared.recorded.sampling
    return Results(
        task=prepared.task.name,
        task_version=prepared.task.version,
        tiny_world=prepared.tiny_world,
        questions=len(prepared.questions.prompts),
        questions_of=prepared.questions.of,
        completions=sum(map(len, samples.values())),
        failed=failed,
        provenance={
            "generator": identity["generator"],
            "lenvm": identity["lenvm"],
            "gamma": gamma,
            "seed": seed,
            "completions_per_question": prepared.settings.n,
            "sampling": sampling,
            "dtype": None if prepared.server else identity.get("dtype", "float32"),
            "systems": {system.name: dict(system.sampling) for system in prepared.systems},
            "questions": prepared.questions.description,
            "versions": _versions(),
        },
        tables=findings.tables,
        curves=findings.curves,
    )


def _versions() -> dict[str, str]:
    names = ("torch", "transformers", "lightning", "math-verify")
    return {"lenvm-lightning": __version__, **{name: importlib.metadata.version(name) for name in names}}
