"""Recipes: finding, reading and checking them, so that every mistake is named before anything starts."""

import copy
import functools
import importlib
import inspect
import re
from collections.abc import Collection, Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args

import lightning as L
import yaml
from jsonargparse import ArgumentError, ArgumentParser

from ..errors import RecipeError, nearest
from ..evaluation.settings import has
from ..evaluation.settings import mistakes as mistakes_of_task
from ..training.callbacks import ResumableCheckpoint
from .sample import FIELDS, wrong_values

STAGES = ("sample", "fit", "variants", "evaluate")
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
        overrides: (``fit.section.key`` or ``sample.key``, value as YAML text) pairs; ``init_args`` may be left out, and
            ``evaluate.key`` is for all of its tasks.

    Raises:
        RecipeError: broken YAML, unknown keys, values of a wrong type, overrides without a value; all problems at once,
            with their lines.
    """
    try:
        text = path.read_text(encoding="utf-8")
        recipe = yaml.safe_load(text) or {}
        keys = list(_key_lines(yaml.compose(text)))
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise RecipeError(f"{path} must hold stages ({', '.join(STAGES)}), found {type(recipe).__name__}")
    recipe = {stage: {} if section is None else section for stage, section in recipe.items()}
    lines = dict(keys)
    # YAML takes the last of several without a word.
    problems = [
        f"{path}:{line}: {key[-1]!r} is there again in line {lines[key]}" for key, line in keys if lines[key] > line
    ]
    problems += [f"{path}:{lines.get(key, 1)}: {problem}" for key, problem in _mistakes(recipe)]
    for key, value in overrides:
        if value is None:
            problems.append(f"--{key}: a value is missing")
            continue
        try:
            problems += [f"--{key}: {text}" for text in _override(recipe, key, yaml.safe_load(value))]
        except yaml.YAMLError as error:
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


def _key_lines(node: yaml.Node | None, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            path = (*prefix, str(key.value))
            yield path, key.start_mark.line + 1
            yield from _key_lines(value, path)
    elif isinstance(node, yaml.SequenceNode):
        for number, entry in enumerate(node.value):
            yield from _key_lines(entry, (*prefix, str(number)))


def vary(recipe: dict[str, Any], name: str) -> dict[str, Any]:
    """The ``fit`` stage of a variant, in a recipe of its own."""
    return _vary(recipe, name)[0]


def _variants(recipe: dict[str, Any]) -> dict[str, Any]:
    return recipe["variants"]["runs"] if "variants" in recipe else {}


def _vary(recipe: dict[str, Any], name: str) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """A variant, and (key, problem) of what it cannot change."""
    varied = {"fit": copy.deepcopy(recipe.get("fit", {}))}
    changed = _variants(recipe)[name]
    return varied, [(key, text) for key, value in changed.items() for text in _override(varied, key, value)]


def _override(recipe: dict[str, Any], key: str, value: Any) -> list[str]:
    """Change a setting, one of ``evaluate`` in all of its tasks; what is wrong with that."""
    before = set(_mistakes(recipe))
    path = key.split(".")
    try:
        if path[0] != "evaluate":
            _set(recipe, path, value)
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


def _set(tree: dict[str, Any], path: list[str], value: Any) -> None:
    section = tree
    for depth, key in enumerate(path[:-1]):
        if "init_args" not in path and isinstance(section.get("init_args"), dict) and key != "class_path":
            section = section["init_args"]
        section = section.setdefault(key, {})
        if not isinstance(section, dict):
            raise TypeError(f"{'.'.join(path[: depth + 1])} is {section!r}, which has no entries")
    if "init_args" not in path and path[-1] != "class_path" and "class_path" in section:
        section = section.setdefault("init_args", {})
    section[path[-1]] = value


def _mistakes(recipe: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """(path, problem) of every key that nothing would read, and of values of ``sample`` that cannot be."""
    yield from _against(recipe, STAGES, (), "stage")
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


def _mistakes_of_sample(sample: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    yield from _against(sample, FIELDS, ("sample",), "setting of sample")
    yield from ((("sample", key), problem) for key, problem in wrong_values(sample))


def _mistakes_of_variants(variants: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    yield from _against(variants, ("jobs", "runs"), ("variants",), "setting of variants")
    jobs, runs = variants.get("jobs", 1), variants.get("runs")
    if type(jobs) is not int or jobs < 1:
        yield ("variants", "jobs"), f"jobs must be a whole number of at least 1, found {jobs!r}"
    if not isinstance(runs, dict) or not all(isinstance(changed, dict) for changed in runs.values()):
        yield ("variants", "runs"), "runs: expected what each run changes, such as {small: {fit.model.keep_layers: 2}}"
        return
    for name, changed in runs.items():
        if not re.fullmatch(r"[\w.=+-]+", str(name)):
            yield ("variants", "runs", str(name)), f"{name!r} cannot be the name of a folder"
        for key in changed:
            if not str(key).startswith("fit."):
                yield ("variants", "runs", str(name), str(key)), f"{key!r}: a variant changes settings of fit only"


def _mistakes_of_evaluate(tasks: Any) -> Iterator[tuple[tuple[str, ...], str]]:
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


def _mistakes_of_fit(fit: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    yield from _against(fit, _FIT_KEYS, ("fit",), "section of fit")
    yield from _mistakes_of_arguments(fit.get("trainer"), L.Trainer, ("fit", "trainer"), "setting of the Trainer")
    yield from _mistakes_of_arguments(
        fit.get("checkpoint"), ResumableCheckpoint, ("fit", "checkpoint"), "setting of checkpoint", own=("dirpath",)
    )
    for section, example in (("model", "lenvm_lightning.TextLenVM"), ("data", "datamodules.TextRollouts")):
        given = fit.get(section)
        if not isinstance(given, dict) or not given.get("class_path"):
            yield ("fit", section), f"{section}: expected a class_path, such as {example}, found {given!r}"
            continue
        yield from _against(given, ("class_path", "init_args"), ("fit", section), f"entry of {section}")
        try:
            cls = _load_class(str(given["class_path"]))
        except RecipeError as error:
            yield ("fit", section, "class_path"), str(error)
            continue
        path = ("fit", section, "init_args")
        yield from _mistakes_of_arguments(given.get("init_args"), cls, path, f"setting of {given['class_path']}")


def _mistakes_of_arguments(
    given: Any, cls: type, path: tuple[str, ...], what: str, own: Collection[str] = ()
) -> Iterator[tuple[tuple[str, ...], str]]:
    """What is wrong with arguments for a class; those named ``own`` are not for people to give."""
    if not isinstance(given, dict):
        if given is not None:
            yield path, f"{path[-1]}: expected settings, found {given!r}"
        return
    known = [name for name in _parameters(cls) if name not in own]
    yield from _against(given, known, path, what)
    for key, value in given.items():
        parts = _dataclass_of(cls, key)
        if parts is not None and isinstance(value, dict):
            yield from _mistakes_of_arguments(value, parts, (*path, key), f"setting of {key}")
        elif key in known and (problem := _misfit(cls, key, value)):
            yield (*path, key), problem


def _dataclass_of(cls: type, name: str) -> type | None:
    """The dataclass that an argument of a class is, or may be."""
    parameter = inspect.signature(cls).parameters.get(name)
    choices = (parameter.annotation, *get_args(parameter.annotation)) if parameter is not None else ()
    return next((choice for choice in choices if isinstance(choice, type) and is_dataclass(choice)), None)


def _misfit(cls: type, name: str, value: Any) -> str:
    """Why a value cannot be an argument of a class; empty where it can."""
    try:
        _parser(cls, name).parse_object({name: value})
    except ArgumentError as error:
        parameter = inspect.signature(cls).parameters.get(name)
        if parameter is None or isinstance(value, dict | list):  # the parser knows which part of it is wrong
            return f"{name}: {' '.join(str(error).split())}"
        return f"{name} must be {inspect.formatannotation(parameter.annotation)}, found {value!r}"
    return ""


@functools.cache
def _parser(cls: type, name: str) -> ArgumentParser:
    """Parser of one argument of a class, so that each is judged for itself."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, skip=set(_parameters(cls)) - {name}, fail_untyped=False)
    return parser


def _against(
    given: dict[str, Any], known: Any, path: tuple[str, ...], what: str
) -> Iterator[tuple[tuple[str, ...], str]]:
    for key in given:
        if key not in known:
            yield (*path, str(key)), f"{key!r} is no {what}{nearest(str(key), known) or '; known: ' + ', '.join(known)}"


@functools.cache
def _parameters(cls: type) -> tuple[str, ...]:
    """Names of a class's arguments, those included that it hands on to its base class."""
    names = ArgumentParser().add_class_arguments(cls, fail_untyped=False)
    return tuple(dict.fromkeys(name.partition(".")[0] for name in names))


def _load_class(path: str) -> type:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, ValueError, AttributeError) as error:
        classes = [f"lenvm_lightning.{n}" for n in ("TextLenVM", "VisionLenVM")]
        classes += [f"datamodules.{n}" for n in ("TextRollouts", "VisionRollouts")]
        raise RecipeError(f"class_path {path!r} cannot be imported{nearest(path, classes)}") from error
