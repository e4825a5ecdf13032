"""``lenvm plan``: what a recipe's training takes, before anything is loaded."""

import argparse

from .flags import add_allow_import

EXAMPLES = """examples:
  lenvm plan qwen2.5-1.5b                                           a shipped recipe
  lenvm plan qwen2.5-1.5b --fit.model.backbone DIR                  no hub: DIR needs to hold a config.json only
  lenvm plan qwen2.5-1.5b --fit.trainer.devices 8 --fit.data.batch_tokens 16384
  lenvm plan qwen2.5-1.5b --tflops 300 --tokens 5e8                 hours, at a speed that your devices keep up

No weight is loaded, and the rollouts need not be there: a step is run on tensors that have shapes and no memory.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``lenvm plan``."""
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a shipped recipe")
    parser.add_argument("--row-tokens", type=int, metavar="N", help="plan for rows of N tokens, not for the longest")
    parser.add_argument("--tflops", type=float, help="TFLOP/s that a device keeps up, to say how long a step takes")
    parser.add_argument(
        "--tokens", type=float, help="tokens to train on, padding included, to say how long it all takes"
    )
    parser.add_argument("--json", action="store_true", help="everything as one line of JSON")
    add_allow_import(parser)
    parser.add_argument(
        "--fit.KEY", dest="_", metavar="VALUE", help="change a setting, such as --fit.trainer.precision bf16-true"
    )


def execute(arguments: argparse.Namespace, overrides: list[tuple[str, str | None]]) -> int:
    """Print the plan; exit status."""
    from ..pipeline.plan_recipe import run_plan

    return run_plan(arguments, overrides)
