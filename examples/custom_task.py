"""A task of your own: does the text name what it was asked about, and how many tokens does that take?

A task is a class with data sources, systems, judging and a summary. Registered, it is one of `lenvm-eval`:

    python examples/custom_task.py                              # the embedded tiny world
    python examples/custom_task.py --places bridge island --n 4     # its own setting, and one of all tasks
    python examples/custom_task.py --generator Qwen/Qwen2.5-3B-Instruct --lenvm runs/qwen2.5-1.5b/model
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lenvm_lightning.cli.evaluate import main
from lenvm_lightning.evaluation import tasks
from lenvm_lightning.evaluation.results import Column, Measure, Table, TableRow
from lenvm_lightning.evaluation.samples import System, by_question
from lenvm_lightning.evaluation.settings import EvaluationSettings, list_of
from lenvm_lightning.evaluation.statistics import mean_and_error
from lenvm_lightning.evaluation.systems import budget_systems
from lenvm_lightning.evaluation.task import DataSource, Findings, Measured, Questions, Task, digest
from lenvm_lightning.rollouts.generators.interface import GeneratedText, Prompt
from lenvm_lightning.utils.settings import TEXT, setting


@dataclass(frozen=True)
class PlaceSettings:
    """What this task alone can be asked: on the command line `--places`, in a recipe `places:`."""

    places: list[str] | None = setting(list_of(TEXT, "a list of places"), "what texts are about", None)


def questions(settings: EvaluationSettings) -> Questions:
    """A prompt for each place; `meta` has what judging needs."""
    places = settings.own.places[: settings.limit]
    prompts = [
        Prompt(f"places/{place}", [{"role": "user", "content": f"Write a text about the {place}."}],
               meta={"place": place})
        for place in places
    ]  # fmt: skip
    return Questions(prompts, len(settings.own.places), {"digest": digest(places)})


class PlaceTask(Task):
    """See `lenvm_lightning.evaluation.task.Task` for what each part is."""

    name = "places"
    settings = PlaceSettings
    sources = (
        DataSource(
            "list",
            questions,
            {"places": ["river", "garden", "school", "market"], "n": 2, "max_tokens": 256},
            systems=("base", "tilt:-5"),
        ),
    )

    def systems(self, settings: EvaluationSettings, names: Sequence[str]) -> list[System]:
        """Return `base` and controls."""
        return budget_systems(names)

    def judge(self, meta: Mapping[str, Any], completion: GeneratedText) -> dict[str, Any]:
        """Return whether the place is named."""
        return {"named": meta["place"] in completion.text.lower()}

    def summarise(self, measured: Measured) -> Findings:
        """Return one row a system."""
        rows = []
        for system in measured.systems:
            samples = measured.samples[system.name]
            measures = {
                "named": Measure(*mean_and_error(by_question(samples, lambda s: float(s.found["named"])))),
                "tokens": Measure(*mean_and_error(by_question(samples, lambda s: s.tokens))),
            }
            rows.append(TableRow({"system": system.name}, measures, len(samples), len(measured.prompts)))
        columns = [Column("named", "named", "up", ".2f"), Column("tokens", "tokens", "down", ".1f")]
        return Findings([Table("places", columns, rows)])


tasks.register(PlaceTask())

if __name__ == "__main__":
    sys.exit(main(["--task", "places", *sys.argv[1:]]))
