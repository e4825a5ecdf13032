"""lenvm-lightning: models that know, at every token, how many are still to come."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .module import LenVMModule, TextLenVM, VisionLenVM
    from .value_model import LengthValueModel, LenVMConfig

_WHERE = {
    "LengthValueModel": "value_model",
    "LenVMConfig": "value_model",
    "LenVMModule": "module",
    "TextLenVM": "module",
    "VisionLenVM": "module",
}

__all__ = ["LenVMConfig", "LenVMModule", "LengthValueModel", "TextLenVM", "VisionLenVM"]


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import; `lightning --help` should not.
    if name in _WHERE:
        return getattr(import_module(f".{_WHERE[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
