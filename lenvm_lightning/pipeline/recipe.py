"""Recipes: finding, reading and checking them, so that every mistake is named before anything starts."""

import contextlib
import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L

from ..errors import RecipeError, nearest
from ..evaluation.read_settings import has
from ..evaluation.read_settings import mistakes as mistakes_of_task
from ..rollouts.sample import is_server, model_of
from ..training.callbacks import ResumableCheckpoint
from ..training.loggers import RUN_FOLDER, needs_save_dir
from ..utils.plain_yaml import parse_yaml, read_yaml_file
from .allowed_imports import load_class
from .class_arguments import Mistake, mistakes_of_arguments, mistakes_of_class, unknown_keys
from .sample_stage import FIELDS, wrong_values

STAGES = ("sample", "fit", "variants", "evaluate")
_LOGGERS = "lightning.pytorch.loggers."
_FIT_KEYS = ("seed_everything", "model", "data", "trainer", "checkpoint")


def recipes_folder() -> Path:
    """Where the shipped recipes are: inside the installed package, or beside it in a checkout."""
    inside = Path(__file__).parents[1] / "recipes"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "recipes"


def find_recipe(name: str) -> Path:
    """Path of a recipe given as a file, or as the name of a shipped one.

    Raises:
        RecipeError: there is none; the shipped ones are listed.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    shipped = {p.stem: p for p in sorted(recipes_folder().glob("*.yaml"))}
    stem = path.name.removesuffix(".yaml")
    # `recipes/x.yaml` names the shipped one too, where there is no checkout.
    if stem in shipped and path.parent in (Path(), Path("recipes")):
        return shipped[stem]
    raise RecipeError(
        f"no recipe {name!r}: no such file, and no shipped recipe of that name{nearest(stem, shipped)}\n"
        f"shipped: {', '.join(shipped)}"
    )


def read_recipe(path: Path, overrides: list[tuple[str, str | None]]) -> dict[str, Any]:
    """A recipe with overrides applied, every key checked; it holds the stages that are to be run, and no others.

    Args:
        path: the YAML file.
        overrides: (`fit.section.key` or `sample.key`, value as YAML text) pairs; `init_args` may be left out, and
            `evaluate.key` is for all of its tasks. `fit.model.backbone` with a plain name changes the source of the
            backbone and keeps its other settings. `generator` names another one in all stages, see `rename_generator`.

    Raises:
        RecipeError: broken YAML, unknown keys, values of a wrong type, overrides without a value; all problems at once,
            with their lines.
    """
    recipe, keys = read_yaml_file(path, RecipeError)
    recipe = {} if recipe is None else recipe
    if not isinstance(recipe, dict):
        raise RecipeError(f"{path} must hold stages ({', '.join(STAGES)}), found {type(recipe).__name__}")
    recipe = {stage: {} if section is None else section for stage, section in recipe.items()}
    lines = dict(keys)
    # YAML takes the last of several silently.
    problems = [
        f"{path}:{line}: {key[-1]!r} is there again in line {lines[key]}" for key, line in keys if lines[key] > line
    ]
    _spell_out(recipe)
    problems += [f"{path}:{_line_of(key, lines)}: {problem}" for key, problem in _mistakes(recipe)]
    for key, value in overrides:
        if value is None:
            problems.append(f"--{key}: a value is missing")
            continue
        try:
            problems += [f"--{key}: {text}" for text in _override(recipe, key, parse_yaml(value))]
        except ValueError as error:
            problems.append(f"--{key}: {error}")
    if not problems:
        problems = [
            f"{path}:{lines.get(('variants', 'runs', name, key), 1)}: {text}"
            for name in _variants(recipe)
            for key, text in _vary(recipe, name)[1]
        ]
    if not problems and not any(stage in recipe for stage in STAGES):
        problems.append(f"{path} has no stage; there are {', '.join(STAGES)}")
    if problems:
        raise RecipeError("the recipe has mistakes:\n  " + "\n  ".join(problems))
    return recipe


def _line_of(key: tuple[str, ...], lines: dict[tuple[str, ...], int]) -> int:
    """Line of a key, or of the nearest section around it that the file has."""
    while key and key not in lines:
        key = key[:-1]
    return lines.get(key, 1)


def _spell_out(recipe: dict[str, Any]) -> None:
    """Write short forms of `fit` out, in place, so that they are the same settings as the long ones.

    `backbone: NAME` is `backbone: {source: NAME}`. `logger: CSVLogger` is its class_path, and a logger that must
    be told where to write writes into the folder of the run.
    """
    fit = recipe.get("fit")
    if not isinstance(fit, dict):
        return
    model, trainer = fit.get("model"), fit.get("trainer")
    arguments = model.get("init_args") if isinstance(model, dict) else None
    if isinstance(arguments, dict) and isinstance(arguments.get("backbone"), str):
        arguments["backbone"] = {"source": arguments["backbone"]}
    if isinstance(trainer, dict) and "logger" in trainer:
        given = trainer["logger"]
        trainer["logger"] = [*map(_spelled_out, given)] if isinstance(given, list) else _spelled_out(given)


def _spelled_out(logger: Any) -> Any:
    if isinstance(logger, str):
        logger = {"class_path": logger}
    if not isinstance(logger, dict) or not isinstance(logger.get("class_path"), str):
        return logger
    name, arguments = logger["class_path"], logger.get("init_args") or {}
    logger = {**logger, "class_path": name if "." in name else _LOGGERS + name}
    with contextlib.suppress(RecipeError):  # no such class, which is told with the other mistakes
        if isinstance(arguments, dict) and needs_save_dir(load_class(logger["class_path"])):
            logger["init_args"] = {"save_dir": RUN_FOLDER, **arguments}
    return logger


def vary(recipe: dict[str, Any], name: str) -> dict[str, Any]:
    """The `fit` stage of a variant, in a recipe of its own."""
    return _vary(recipe, name)[0]


def _variants(recipe: dict[str, Any]) -> dict[str, Any]:
    return recipe["variants"]["runs"] if "variants" in recipe else {}


def _vary(recipe: dict[str, Any], name: str) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """A variant, and (key, problem) of what it cannot change."""
    varied = {"fit": copy.deepcopy(recipe.get("fit", {}))}
    changed = _variants(recipe)[name]
    return varied, [(key, text) for key, value in changed.items() for text in _override(varied, key, value)]


def _override(recipe: dict[str, Any], key: str, value: Any) -> list[str]:
    """Change a setting, one of `evaluate` in all of its tasks; what is wrong with that."""
    before = set(_mistakes(recipe))
    path = key.split(".")
    try:
        if key == "generator":
            rename_generator(recipe, value)
        elif path[0] != "evaluate":
            if path[:2] == ["fit", "model"] and path[-1] == "backbone" and isinstance(value, str):
                path = [*path, "source"]
            _set(recipe, path, value)
            _spell_out(recipe)
        else:
            tasks = recipe.get("evaluate")
            if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
                return ["the recipe has no list of tasks under evaluate"]
            for task in tasks:
                if has(task.get("task"), path[-1]):
                    _set(task, path[1:], value)
    except TypeError as error:
        return [str(error)]
    return [text for where, text in _mistakes(recipe) if (where, text) not in before]


def rename_generator(recipe: dict[str, Any], name: str) -> None:
    """Name another generator wherever a recipe names its own: where it samples, trains and measures.

    A server has no weights to train: with its address, the backbone stays.

    Args:
        recipe: changed in place. Its own generator is that of `sample`, or else of the first task that names one.
        name: such as the directory where a copy of the model lies.

    Raises:
        TypeError: the recipe names none.
    """
    tasks = [task for task in recipe.get("evaluate") or () if isinstance(task, dict)]
    sections = [recipe[stage] for stage in ("sample",) if isinstance(recipe.get(stage), dict)] + tasks
    named = [section for section in sections if section.get("generator")]
    if not named:
        raise TypeError("the recipe names no generator under sample or evaluate")
    own = named[0]["generator"]
    for section in named:
        if section["generator"] == own:
            section["generator"] = name
    model = recipe.get("fit", {}).get("model", {})
    backbone = model.get("init_args", model).get("backbone")
    if isinstance(backbone, dict) and backbone.get("source") == model_of(own) and not is_server(name):
        backbone["source"] = model_of(name)


def _set(tree: dict[str, Any], path: list[str], value: Any) -> None:
    section = tree
    for depth, key in enumerate(path[:-1]):
        if "init_args" not in path and key != "class_path" and ("class_path" in section or "init_args" in section):
            section = _arguments_of(section)
        section = section.setdefault(key, {})
        if not isinstance(section, dict):
            raise TypeError(f"{'.'.join(path[: depth + 1])} is {section!r}, which has no entries")
    if "init_args" not in path and path[-1] != "class_path" and "class_path" in section:
        section = _arguments_of(section)
    section[path[-1]] = value


def _arguments_of(section: dict[str, Any]) -> dict[str, Any]:
    """The init_args beside a class_path, made where there are none yet."""
    if section.get("init_args") is None:
        section["init_args"] = {}
    if not isinstance(section["init_args"], dict):
        raise TypeError(f"init_args is {section['init_args']!r}, which has no entries")
    return section["init_args"]


def _mistakes(recipe: dict[str, Any]) -> Iterator[Mistake]:
    """(path, problem) of every key that nothing would read, and of values of `sample` that cannot be."""
    yield from unknown_keys(recipe, STAGES, (), "stage")
    for stage, mistakes_of in (
        ("sample", _mistakes_of_sample),
        ("fit", _mistakes_of_fit),
        ("variants", _mistakes_of_variants),
    ):
        section = recipe.get(stage, {})
        if not isinstance(section, dict):
            yield (stage,), f"{stage}: expected settings, found {section!r}"
        elif stage in recipe:
            yield from mistakes_of(section)
    if "evaluate" in recipe:
        yield from _mistakes_of_evaluate(recipe["evaluate"])


def _mistakes_of_sample(sample: dict[str, Any]) -> Iterator[Mistake]:
    yield from unknown_keys(sample, FIELDS, ("sample",), "setting of sample")
    yield from ((("sample", key), problem) for key, problem in wrong_values(sample))


def _mistakes_of_variants(variants: dict[str, Any]) -> Iterator[Mistake]:
    yield from unknown_keys(variants, ("jobs", "runs"), ("variants",), "setting of variants")
    jobs, runs = variants.get("jobs", 1), variants.get("runs")
    if type(jobs) is not int or jobs < 1:
        yield ("variants", "jobs"), f"jobs must be a whole number of at least 1, found {jobs!r}"
    if not isinstance(runs, dict) or not all(isinstance(changed, dict) for changed in runs.values()):
        yield ("variants", "runs"), "runs: expected what each run changes, such as {low: {fit.model.gamma: 0.9}}"
        return
    for name, changed in runs.items():
        # Beside the folders of the runs lie `recipes` and a log for each.
        if not re.fullmatch(r"(?!\.+$)[\w.=+-]+(?<!\.log)", str(name)) or name in ("recipes", "rollouts"):
            yield ("variants", "runs", str(name)), f"{name!r} cannot be the name of a folder"
        for key in changed:
            if not str(key).startswith("fit."):
                yield ("variants", "runs", str(name), str(key)), f"{key!r}: a variant changes settings of fit only"


def _mistakes_of_evaluate(tasks: Any) -> Iterator[Mistake]:
    if not isinstance(tasks, list) or not tasks:
        yield ("evaluate",), f"evaluate: expected a list of tasks, such as [{{task: lifebench}}], found {tasks!r}"
        return
    for number, task in enumerate(tasks):
        path = ("evaluate", str(number))
        if not isinstance(task, dict):
            yield path, f"expected settings of a task, found {task!r}"
            continue
        for key, problem in mistakes_of_task(task):
            yield (*path, str(key)) if key else path, problem


def _mistakes_of_fit(fit: dict[str, Any]) -> Iterator[Mistake]:
    yield from unknown_keys(fit, _FIT_KEYS, ("fit",), "section of fit")
    trainer = fit.get("trainer")
    if isinstance(trainer, dict):
        yield from _mistakes_of_loggers(trainer.get("logger"), ("fit", "trainer", "logger"))
        trainer = {key: value for key, value in trainer.items() if key != "logger"}
    yield from mistakes_of_arguments(trainer, L.Trainer, ("fit", "trainer"), "setting of the Trainer")
    yield from mistakes_of_arguments(
        fit.get("checkpoint"), ResumableCheckpoint, ("fit", "checkpoint"), "setting of checkpoint", own=("dirpath",)
    )
    for section, example in (("model", "lenvm_lightning.TextLenVM"), ("data", "datamodules.TextRollouts")):
        yield from mistakes_of_class(fit.get(section), ("fit", section), example)


def _mistakes_of_loggers(given: Any, path: tuple[str, ...]) -> Iterator[Mistake]:
    if given is None or isinstance(given, bool):
        return
    if not isinstance(given, list):
        yield from mistakes_of_class(given, path, _LOGGERS + "CSVLogger")
        return
    for number, one in enumerate(given):
        yield from mistakes_of_class(one, (*path, str(number)), _LOGGERS + "CSVLogger")
