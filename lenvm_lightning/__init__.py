"""lenvm-lightning: models that know, at every token, how many are still to come."""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Lightning imports bitsandbytes, which on some CPUs asks for one more package: for a kernel that nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

if TYPE_CHECKING:
    from .adapters import LoRA
    from .generation import generate, stream
    from .guidance import AtLeast, AtMost, EqualTo, Gated, Scale, Tilt
    from .hook import guided
    from .module import LenVMModule, TextLenVM, VisionLenVM
    from .value_model import LengthValueModel, LenVMConfig

_WHERE = {
    "AtLeast": "guidance",
    "AtMost": "guidance",
    "EqualTo": "guidance",
    "Gated": "guidance",
    "LenVMConfig": "value_model",
    "LenVMModule": "module",
    "LoRA": "adapters",
    "LengthValueModel": "value_model",
    "Scale": "guidance",
    "TextLenVM": "module",
    "Tilt": "guidance",
    "VisionLenVM": "module",
    "generate": "generation",  # a module of the same name would hide the function
    "guided": "hook",
    "stream": "generation",
}

__all__ = [
    "AtLeast",
    "AtMost",
    "EqualTo",
    "Gated",
    "LenVMConfig",
    "LenVMModule",
    "LengthValueModel",
    "LoRA",
    "Scale",
    "TextLenVM",
    "Tilt",
    "VisionLenVM",
    "generate",
    "guided",
    "stream",
]


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import; `lightning --help` should not.
    if name in _WHERE:
        return getattr(import_module(f".{_WHERE[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
