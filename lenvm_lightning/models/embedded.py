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
        generator: for a value model, the generator whose completions it was trained on, embedded or a hub id; None for
            a generator.
        norms: for an adapter, what `norms_of` finds in copies of its base, which is a hub id; None for whole weights.
    """

    name: str
    folder: Path
    notice: str
    generator: str | None = None
    norms: str | None = None


_models: dict[str, EmbeddedModel] = {}
_scripts: dict[str, str] = {}  # first letters of the names of scripts that write completions -> notice


def register(model: EmbeddedModel) -> None:
    """Make a model known by its name. Its generator, if it has an embedded one, comes first.

    Raises:
        ValueError: the name is taken by another model, or the generator is not known.
    """
    if _models.setdefault(model.name, model) != model:
        raise ValueError(f"there is an embedded model {model.name!r} already, in {_models[model.name].folder}")
    if model.generator is not None and model.norms is None and model.generator not in generators():
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
    """Name of the value model that was trained on completions of this generator; None where there is none.

    Args:
        generator: embedded name, hub id, or a directory with a copy of a model that is called so on the hub.
    """
    found = next((name for name, model in _models.items() if model.generator == generator), None)
    if found is None and Path(generator).is_dir() and any(model.norms for model in _models.values()):
        from .norms import norms_of  # reads weights, with torch

        norms = norms_of(Path(generator))
        return next((name for name, model in _models.items() if norms is not None and model.norms == norms), None)
    return found


def generator_of(value_model: str) -> str | None:
    """Embedded name or hub id of the generator that an embedded value model was trained for; None for others."""
    return _models[value_model].generator if value_model in _models else None


def base_for(value_model: str, generator: str) -> str | None:
    """Where to take the weights under an embedded adapter from: the generator, where it was trained for that one.

    None where it says so itself.
    """
    adapter = value_model in _models and _models[value_model].norms is not None
    return generator if adapter and value_model_of(generator) == value_model else None


def notice(name: str) -> str | None:
    """What must be said with outputs of this model or script, by its name; None for anything not embedded."""
    if name in _models:
        return _models[name].notice
    return next((text for prefix, text in _scripts.items() if name.startswith(prefix)), None)


def wrote(generator: str) -> bool:
    """Whether completions of this generator (the name in their records) were written by a model or script in here."""
    return generator in generators() or generator.startswith(tuple(_scripts))
