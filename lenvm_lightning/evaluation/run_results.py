"""What finished runs leave in their folders, read for comparisons: every value of the type it must have."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError

from ..errors import DataError, EvaluationError
from ..utils.json_input import read_object

RESULTS = "results.json"
_COMPARABLE = {
    "gamma": "gamma",
    "target": "target",
    "objective": "loss settings",
    "held_out_digest": "held-out completions",
}
_OF_EVERY_RUN = ("tiny_world",)
_OF_COMPARED_RUNS = (*_COMPARABLE, "held_out_completions", "held_out_prompts", "train_prompts", "train_completions",
                     "parameters", "tiny_world")  # fmt: skip
OF_ERRORS = ("target", "gamma", "held_out_completions", "held_out_prompts")


def read_results(folders: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Results of finished runs, by the name of their folder.

    Raises:
        EvaluationError: some are none; all of them are listed.
    """
    found, problems = {}, []
    for folder in map(Path, folders):
        try:
            results = read_object(folder / RESULTS)
        except (OSError, ValueError) as error:
            problems.append(f"{folder}: {error}")
            continue
        if problem := misfit(results, _OF_EVERY_RUN):
            problems.append(f"{folder}: {problem}")
        found[folder.name] = results
    if problems:
        raise EvaluationError("these are no finished runs:\n  " + "\n  ".join(problems))
    return found


def results_of(folder: Path) -> dict[str, Any] | str:
    """Results of a run folder, or why there are none to compare."""
    file = folder / RESULTS
    if not folder.is_dir():
        return "no such folder"
    if not file.exists():
        unfinished = (folder / "recipe.yaml").exists()
        return "has not finished: lightning run goes on with it" if unfinished else f"no run: it has no {RESULTS}"
    try:
        results = read_object(file)
    except (OSError, ValueError) as error:
        return f"{RESULTS} cannot be read: {error}"
    if "gamma" not in results:
        return "the run of a generator, not of a length value model"
    if problem := misfit(results, ()):
        return problem
    loss = results["metrics"].get("loss")
    if loss is None:
        return "it was not validated"
    if not loss > 0:
        return f"its validation loss is {loss}, not a positive number"
    return misfit(results, _OF_COMPARED_RUNS) or results


_Count = Annotated[int, Field(ge=1, lt=2**63)]


class _RunResults(BaseModel):
    """Types of what a run leaves, as far as it is compared; what is not there is looked for afterwards."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    gamma: PositiveFloat | None = None
    target: str | None = None
    objective: dict[str, Any] | None = None
    metrics: dict[str, float | None] = {}
    parameters: _Count | None = None
    train_prompts: _Count | None = None
    train_completions: _Count | None = None
    held_out_completions: _Count | None = None
    held_out_prompts: _Count | None = None
    held_out_digest: str | None = None
    tiny_world: bool = False


def misfit(results: dict[str, Any], needed: Sequence[str]) -> str:
    """What is wrong with the results of a run: values of a wrong type, or keys that are missing; else empty."""
    results.setdefault("metrics", {})
    try:
        results |= _RunResults.model_validate(results).model_dump(exclude_unset=True)  # such as 3, which is 3.0
    except ValidationError as error:
        first = error.errors()[0]
        return f"{RESULTS}: {'.'.join(map(str, first['loc']))}: {first['msg']}"
    missing = [name for name in needed if results.get(name) is None]
    if missing:
        return f"{RESULTS} lacks {', '.join(missing)}, which older versions did not write: run it again with --fresh"
    return ""


def check_comparable(found: dict[Path, dict[str, Any]]) -> None:
    """Refuse runs whose losses mean different things.

    Args:
        found: results by folder, from `results_of`.

    Raises:
        DataError: other held-out completions, another gamma, target or loss; all differences.
    """
    (first, wanted), *others = found.items()
    problems = []
    for folder, results in others:
        for key, name in _COMPARABLE.items():
            if results[key] != wanted[key]:
                problems.append(f"  {folder}: {name} {_shown(key, results)}, but {_shown(key, wanted)} in {first}")
    if problems:
        raise DataError(
            "validation losses of these runs cannot be compared:\n"
            + "\n".join(problems)
            + "\nValidate all runs on the "
            "same completions (rows that say `split: test`, the same max_length and tokenizer), with one gamma, target "
            "and loss."
        )


def _shown(key: str, results: dict[str, Any]) -> str:
    if key != "held_out_digest":
        return str(results[key])
    return f"{results[key]} ({results['held_out_completions']} of {results['held_out_prompts']} prompts)"
