"""``lightning run``: the stages of a recipe."""

import argparse
from pathlib import Path

from .flags import add_allow_import

EXAMPLES = """examples:
  lightning run recipes/vlm_lenvm.yaml                              the embedded tiny world, images and text
  lightning run text_lenvm --fit.trainer.max_steps 50               a shipped recipe by name, one setting changed
  lightning run text_lenvm --fit.data.files 'rollouts/*.jsonl'      your own rollouts
  lightning run smollm2-135m --generator ~/models/smollm2           the model lies in a directory, no hub is needed
  lightning run text_lenvm --check                                  look at recipe and data, train nothing
  lightning run text_lenvm --sample.n 16 --sample.limit 200         sample other rollouts before training
  lightning run lifebench --evaluate.limit 5                        a recipe that only measures
  lightning run text_lenvm --fit.help                               every setting there is
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``lightning run``."""
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a shipped recipe")
    parser.add_argument(
        "--generator", metavar="NAME", help="another generator in all stages, such as a directory with a copy of it"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder that holds all runs (default: runs)")
    parser.add_argument("--name", help="name of the run (default: the recipe's; another number if that is taken)")
    parser.add_argument("--check", action="store_true", help="look at recipe and data and report, do nothing")
    parser.add_argument("--fresh", action="store_true", help="delete this run and train again; rollouts stay")
    add_allow_import(parser)
    for stage, example in (
        ("sample", "--sample.n 16"),
        ("fit", "--fit.trainer.max_steps 50"),
        ("evaluate", "--evaluate.limit 20"),
    ):
        parser.add_argument(
            f"--{stage}.KEY",
            dest="_",
            metavar="VALUE",
            help=f"change a setting of the {stage} stage, such as {example}",
        )


def execute(arguments: argparse.Namespace, overrides: list[tuple[str, str | None]]) -> int:
    """Run the recipe; exit status."""
    from ..pipeline.run_recipe import run_recipe

    if arguments.generator is not None:
        overrides = [("generator", arguments.generator), *overrides]
    return run_recipe(
        arguments.recipe,
        overrides,
        runs=arguments.runs,
        name=arguments.name,
        check=arguments.check,
        fresh=arguments.fresh,
        allow_import=arguments.allow_import,
    )
