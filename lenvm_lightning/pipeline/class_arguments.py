"""Settings for the arguments of a class, compared with its signature, so that every mistake is found with its place.

jsonargparse names the first mistake only, and no line; here each argument is judged for itself.
"""

import argparse
import difflib
import functools
import inspect
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, get_args, get_origin

from jsonargparse import ArgumentError, ArgumentParser

from ..errors import RecipeError, nearest
from .allowed_imports import allowed, hold_to_list, load_class, refusal

_judged: dict[tuple[type, str, str, tuple[str, ...]], str] = {}  # what was found for a value, see `_misfit`

Mistake = tuple[tuple[str, ...], str]  # path of a key in the recipe, and what is wrong with it


def mistakes_of_class(given: Any, path: tuple[str, ...], example: str) -> Iterator[Mistake]:
    """What is wrong with a class_path and its init_args.

    Args:
        given: what the recipe says.
        path: where it says so.
        example: a class_path that could be there.
    """
    section = path[-1]
    if not isinstance(given, dict) or not given.get("class_path"):
        yield path, f"{section}: expected a class_path, such as {example}, found {given!r}"
        return
    yield from unknown_keys(given, ("class_path", "init_args"), path, f"entry of {section}")
    try:
        cls = load_class(str(given["class_path"]))
    except RecipeError as error:
        yield (*path, "class_path"), str(error)
        return
    what = f"setting of {given['class_path']}"
    yield from mistakes_of_arguments(given.get("init_args"), cls, (*path, "init_args"), what)


def mistakes_of_arguments(
    given: Any, cls: type, path: tuple[str, ...], what: str, own: Collection[str] = ()
) -> Iterator[Mistake]:
    """What is wrong with arguments for a class; those named `own` are not for people to give."""
    if not isinstance(given, dict):
        if given is not None:
            yield path, f"{path[-1]}: expected settings, found {given!r}"
        return
    known = [name for name in _parameters(cls) if name not in own]
    yield from unknown_keys(given, known, path, what, inside=_names_inside(cls, known))
    for key, value in given.items():
        group = _dataclass_of(cls, key)
        if group is not None and isinstance(value, dict):
            yield from _mistakes_of_group(value, group, (*path, key))
        elif key in known and (problem := _misfit(cls, key, value)):
            yield (*path, key), problem


def _mistakes_of_group(given: dict[str, Any], group: type, path: tuple[str, ...]) -> Iterator[Mistake]:
    """What is wrong with settings that a dataclass holds together, such as those of the optimizer."""
    yield from mistakes_of_arguments(given, group, path, f"setting of {path[-1]}")
    for field in fields(group):
        required = field.default is MISSING and field.default_factory is MISSING
        if required and field.name not in given:
            yield path, f"{path[-1]}: {field.name} is missing"


@functools.cache
def _dataclass_of(cls: type, name: str) -> type | None:
    """The dataclass that an argument of a class is, or may be."""
    annotation = _annotation(cls, name)
    choices = (annotation, *get_args(annotation))
    return next((choice for choice in choices if isinstance(choice, type) and is_dataclass(choice)), None)


@functools.cache
def _annotation(cls: type, name: str) -> Any:
    """Type of an argument of a class, or of what it is handed on to: a base class, or a dataclass of its settings.

    None where nothing says.
    """
    for owner in cls.__mro__:
        parameter = inspect.signature(owner).parameters.get(name) if "__init__" in vars(owner) else None
        if parameter is not None:
            return None if parameter.annotation is inspect.Parameter.empty else parameter.annotation
    settings = getattr(cls, "settings_class", None)
    return next((field.type for field in fields(settings) if field.name == name), None) if settings else None


def _names_inside(cls: type, known: Collection[str]) -> dict[str, str]:
    """Where the settings within groups are, by their own names: `lr` is `optimizer.lr`."""
    found: dict[str, str] = {}
    for name in known:
        group = _dataclass_of(cls, name)
        for field in fields(group) if group is not None else ():
            found[field.name] = f"{name}.{field.name}"
    return found


def print_optional_groups(cls: type, prefix: str) -> None:
    """Print help for the groups of settings that jsonargparse's own help of a class leaves out.

    These are dataclasses that something else may stand for: a plain name, or null.

    Args:
        cls: the class.
        prefix: where its arguments are, such as `model`.
    """
    for name in _parameters(cls):
        group = _dataclass_of(cls, name)
        if group is not None and _annotation(cls, name) is not group:
            parser = ArgumentParser(usage=argparse.SUPPRESS, add_help=False)
            parser.add_class_arguments(group, f"{prefix}.{name}")
            parser.print_help()
            print()


def _misfit(cls: type, name: str, value: Any) -> str:
    """Why a value cannot be an argument of a class; empty where it can."""
    key = (cls, name, repr(value), allowed())  # a recipe is looked at after each change, most of it unchanged
    if key not in _judged:
        _judged[key] = _judge(cls, name, value)
    return _judged[key]


def _judge(cls: type, name: str, value: Any) -> str:
    hold_to_list()
    try:
        found = _parser(cls, name).parse_object({name: value})
    except (ArgumentError, OverflowError) as error:  # a whole number beyond every float
        if refused := re.search(r"Importing '([\w.]+)' is not allowed", str(error)):
            return f"{name}: {refusal(refused[1])}"
        annotation, group = _annotation(cls, name), _dataclass_of(cls, name)
        if group is not None:
            wanted = "a name or settings" if str in get_args(annotation) else "settings"
            return f"{name}: expected {wanted} ({', '.join(_parameters(group))}), found {value!r}"
        if annotation is None or isinstance(value, dict | list):  # the parser knows which part of it is wrong
            return f"{name}: {' '.join(str(error).split())}"
        words = _words_of(annotation)
        if words:
            return f"{name} must be one of {', '.join(words)}, found {value!r}{nearest(str(value), words)}"
        return f"{name} must be {inspect.formatannotation(annotation)}, found {value!r}"
    # YAML has .inf and .nan, and 1e999 is infinite, too; no setting means anything then.
    return "" if _is_finite(found.as_dict()) else f"{name} must be finite, found {value!r}"


def _is_finite(value: Any) -> bool:
    """Whether all numbers within a value are."""
    if isinstance(value, dict | list | tuple):
        return all(map(_is_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


def _words_of(annotation: Any) -> list[str]:
    """What an argument may be, where its type is a list of words, or that and None; else nothing."""
    choices = [choice for choice in (annotation, *get_args(annotation)) if get_origin(choice) is Literal]
    others = [choice for choice in get_args(annotation) if choice not in (*choices, type(None))]
    if len(choices) != 1 or (choices[0] is not annotation and others):
        return []
    return [str(word) for word in get_args(choices[0])]


@functools.cache
def _parser(cls: type, name: str) -> ArgumentParser:
    """Parser of one argument of a class, so that each is judged for itself."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, skip=set(_parameters(cls)) - {name}, fail_untyped=False)
    return parser


def unknown_keys(
    given: dict[str, Any],
    known: Collection[str],
    path: tuple[str, ...],
    what: str,
    inside: Mapping[str, str] | None = None,
) -> Iterator[Mistake]:
    """Every key that is not known, with the nearest that is.

    Args:
        given: keys and values.
        known: keys there are.
        path: where `given` is.
        what: a known key is called.
        inside: full names of keys that are known one section further down.
    """
    for key in given:
        if key not in known:
            yield (*path, str(key)), f"{key!r} is no {what}{_hint(str(key), known, inside or {})}"


def _hint(key: str, known: Collection[str], inside: Mapping[str, str]) -> str:
    if key in inside:
        return f"; it is {inside[key]!r}"
    full_names = {**inside, **{name: name for name in known}}
    close = difflib.get_close_matches(key, full_names, n=1)
    return f"; did you mean {full_names[close[0]]!r}?" if close else f"; known: {', '.join(known)}"


@functools.cache
def _parameters(cls: type) -> tuple[str, ...]:
    """Names of a class's arguments, those included that it hands on to its base class."""
    names = ArgumentParser().add_class_arguments(cls, fail_untyped=False)
    return tuple(dict.fromkeys(name.partition(".")[0] for name in names))
