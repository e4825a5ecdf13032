"""Names of the models that come inside the package: where each lies, and what must be said with its outputs.

A registry without contents of its own: whoever ships models adds them on import, so that loading a model by name needs
no knowledge of who ships it. Imports nothing heavy.
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class EmbeddedModel:
    """One model inside the package.

    Attributes:
        name: what users type.
        folder: an ordinary model directory.
        notice: what every output made with it says.
        generator: for a value model, the embedded generator whose completions it was trained on; None for a generator.
    """

    name: str
    folder: Path
    notice: str
    generator: str | None = None


_models: dict[str, EmbeddedModel] = {}
_scripts: dict[str, str] = {}  # first letters of the names of scripts that write completions -> notice


def register(model: EmbeddedModel) -> None:
    """Make a model known by its name. Its generator, if it has one, comes first.

    Raises:
        ValueError: the name is taken by another model, or the generator is not known.
    """
    if _models.setdefault(model.name, model) != model:
        raise ValueError(f"there is an embedded model {model.name!r} already, in {_models[model.name].folder}")
    if model.generator is not None and model.generator not in generators():
        del _models[model.name]
        raise ValueError(f"the generator {model.generator!r} of {model.name!r} is not registered")


def register_script(prefix: str, notice: str) -> None:
    """Make known that completions of a generator whose name starts with `prefix` come from a script of the package."""
    _scripts[prefix] = notice


def generators() -> tuple[str, ...]:
    """Names of the embedded generators."""
    return tuple(name for name, model in _models.items() if model.generator is None)


def value_models() -> tuple[str, ...]:
    """Names of the embedded length value models."""
    return tuple(name for name, model in _models.items() if model.generator is not None)


def is_embedded(name: str) -> bool:
    """Whether a generator or value model of this name is inside the package."""
    return name in _models


def folder(name: str) -> Path:
    """The model directory of an embedded name.

    Raises:
        ValueError: there is no such model.
    """
    if name not in _models:
        raise ValueError(f"no embedded model is called {name!r}; there are {', '.join(_models)}")
    return _models[name].folder


def value_model_of(generator: str) -> str | None:
    """Name of the value model that was trained on completions of this generator; None where there is none."""
    return next((name for name, model in _models.items() if model.generator == generator), None)


def notice(name: str) -> str | None:
    """What must be said with outputs of this model or script, by its name; None for anything not embedded."""
    if name in _models:
        return _models[name].notice
    return next((text for prefix, text in _scripts.items() if name.startswith(prefix)), None)


def wrote(generator: str) -> bool:
    """Whether completions of this generator (the name in their records) were written by a model or script in here."""
    return generator in generators() or generator.startswith(tuple(_scripts))
