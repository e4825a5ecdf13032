"""lenvm-lightning: models that know, at every token, how many are still to come."""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Lightning imports bitsandbytes, which on some CPUs asks for one more package: for a kernel that nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

if TYPE_CHECKING:
    from .decoding.generate import generate, stream
    from .decoding.transformers_hook import guided
    from .distributions.heads import HeadConfig
    from .guidance import AtLeast, AtMost, EqualTo, Gated, Scale, Tilt
    from .models.adapters import LoRA
    from .models.backbone_config import BackboneConfig
    from .models.lenvm_config import LenVMConfig
    from .models.value_model import LengthValueModel
    from .objectives import LossConfig
    from .training.module import LenVMModule, TextLenVM, VisionLenVM
    from .training.optimizers import OptimizerConfig

_WHERE = {
    "AtLeast": "guidance",
    "AtMost": "guidance",
    "BackboneConfig": "models.backbone_config",
    "EqualTo": "guidance",
    "Gated": "guidance",
    "HeadConfig": "distributions.heads",
    "LenVMConfig": "models.lenvm_config",
    "LenVMModule": "training.module",
    "LoRA": "models.adapters",
    "LossConfig": "objectives",
    "LengthValueModel": "models.value_model",
    "OptimizerConfig": "training.optimizers",
    "Scale": "guidance",
    "TextLenVM": "training.module",
    "Tilt": "guidance",
    "VisionLenVM": "training.module",
    "generate": "decoding.generate",
    "guided": "decoding.transformers_hook",
    "stream": "decoding.generate",
}

__all__ = [
    "AtLeast",
    "AtMost",
    "BackboneConfig",
    "EqualTo",
    "Gated",
    "HeadConfig",
    "LenVMConfig",
    "LenVMModule",
    "LengthValueModel",
    "LoRA",
    "LossConfig",
    "OptimizerConfig",
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


# Last, for it registers the embedded models and prompt sets with modules of this package: names such as `tiny-text`
# work wherever a model is named. Imports nothing heavy.
from . import tinyworld  # noqa: E402, F401
