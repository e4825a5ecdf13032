"""Which models a command runs: the flags that name them, and how they are opened."""

import argparse
from typing import TYPE_CHECKING

from ..errors import GenerationError
from ..models import embedded

if TYPE_CHECKING:
    from ..models.value_model import LengthValueModel


def add_models(parser: argparse.ArgumentParser, generator: str) -> None:
    """Flags that name generator and length value model; ``generator`` is the help of the first."""
    parser.add_argument("--generator", metavar="MODEL", help=generator)
    parser.add_argument(
        "--lenvm", metavar="MODEL", help="a length value model of the same vocabulary (default: the embedded one)"
    )
    parser.add_argument("--gamma", type=float, help="of a length value model whose folder does not say")
    parser.add_argument("--dtype", help="of the weights, such as bfloat16 (default: its own, or float32)")
    parser.add_argument("--device", help="such as cuda:1 (default: a GPU if there is one)")


def open_lenvm(arguments: argparse.Namespace, generator: str) -> "LengthValueModel":
    """The length value model that was named, or the embedded one of an embedded generator.

    Raises:
        GenerationError: none was named, and there is none for this generator.
    """
    source = arguments.lenvm or embedded.value_model_of(generator)
    if source is None:
        raise GenerationError(
            f"--lenvm is missing: to control {generator} takes a length value model of its completions. Train one:\n"
            f"  lenvm sample --generator {generator} --prompts YOUR_PROMPTS --out rollouts/mine\n"
            f"  lightning run qwen2.5-1.5b --fit.model.backbone {generator} "
            "--fit.data.files rollouts/mine/rollouts.jsonl"
        )
    from ..models.dtypes import open_value_model
    from ..rollouts.generators.local.loading import place_for

    device = place_for(arguments.device, arguments.dtype)
    return open_value_model(source, gamma=arguments.gamma, dtype=arguments.dtype, device=device, generator=generator)
