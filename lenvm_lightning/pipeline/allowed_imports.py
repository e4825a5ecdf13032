"""Which packages a recipe may name classes of. To import a module is to run it, so no other is imported at a look.

`class_path` and whatever else jsonargparse would import by its name are held to one list, by jsonargparse's own policy
for the whole process.
"""

import contextlib
import importlib
from collections.abc import Collection, Iterator
from typing import Any

from jsonargparse import set_parsing_settings

from ..errors import RecipeError, nearest

PACKAGES = ("lenvm_lightning", "datamodules", "lightning", "torch", "torchmetrics")
_more: tuple[str, ...] = ()  # named on the command line
_told: set[str] = set()  # what jsonargparse was told to allow


@contextlib.contextmanager
def imports_from(more: Collection[str]) -> Iterator[None]:
    """Within it, classes of these packages may be named, too.

    Args:
        more: packages, such as `mine`, or modules in them.

    Raises:
        RecipeError: a name that no package has, or one that may never be named.
    """
    global _more
    wrong = [name for name in more if not _is_path(name) or name.partition(".")[0] == "jsonargparse"]
    if wrong:
        raise RecipeError(f"--allow-import: no package that could be allowed is called {', '.join(map(repr, wrong))}")
    before, _more = _more, (*_more, *more)
    try:
        hold_to_list()
        yield
    finally:
        _more = before
        hold_to_list()


def allowed() -> tuple[str, ...]:
    """Names of all packages that may be imported now."""
    return (*PACKAGES, *_more)


def named_packages() -> tuple[str, ...]:
    """Those that were named on the command line."""
    return _more


def hold_to_list() -> None:
    """Let jsonargparse import nothing that a value names but what is allowed; call it before anything is parsed."""
    if _told != set(allowed()):
        no_more = sorted(_told - set(allowed()))
        set_parsing_settings(
            import_path_denylist=["*", *no_more],
            import_path_allowlist=list(allowed()),
            instantiate_subclass_spec_in_any=False,  # where anything may be, a class_path is no order to make one
        )
        _told.clear()
        _told.update(allowed())


def load_class(path: str) -> type:
    """The class that a class_path names.

    Raises:
        RecipeError: there is none, or it is of a package that may not be imported.
    """
    if not _is_path(path) or "." not in path:
        raise RecipeError(
            f"class_path {path!r} names no class: give package.module.Class, such as {PACKAGES[0]}.TextLenVM"
        )
    _require_allowed(path, path)
    module, _, name = path.rpartition(".")
    try:
        found: Any = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        classes = [f"lenvm_lightning.{n}" for n in ("TextLenVM", "VisionLenVM")]
        classes += [f"datamodules.{n}" for n in ("TextRollouts", "VisionRollouts")]
        raise RecipeError(f"class_path {path!r} cannot be imported{nearest(path, classes)}") from error
    except Exception as error:  # of that module's own code
        raise RecipeError(f"class_path {path!r} cannot be imported: {type(error).__name__}: {error}") from error
    if not isinstance(found, type):
        raise RecipeError(f"class_path {path!r} names no class, but {type(found).__name__}")
    # Modules import others: `torch.os.PathLike` is nothing of torch's.
    _require_allowed(f"{found.__module__}.{found.__qualname__}", path)
    return found


def refusal(path: str) -> str:
    """Why a class_path is not imported, and what to do about it."""
    return (
        f"class_path {path!r} is none of the packages that a recipe may name classes of ({', '.join(allowed())}): "
        f"nothing of it is imported. If you trust its code, say --allow-import {path.partition('.')[0]}"
    )


def _require_allowed(path: str, given: str) -> None:
    if not any(path == name or path.startswith(f"{name}.") for name in allowed()):
        found = "" if path == given else f" ({given!r} is it by another name)"
        raise RecipeError(refusal(path) + found)


def _is_path(name: str) -> bool:
    return all(part.isidentifier() for part in name.split("."))
