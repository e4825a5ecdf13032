"""The commands ``lightning`` and ``lenvm``: parse a line, run a recipe, turn errors into sentences."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .. import __version__
from ..errors import LenVMError

_EXAMPLES = """examples:
  lightning run recipes/vlm_lenvm.yaml                              the embedded tiny world, pictures and text
  lightning run text_lenvm --fit.trainer.max_steps 50               a shipped recipe by name, one setting changed
  lightning run text_lenvm --fit.data.files 'rollouts/*.jsonl'      your own rollouts
  lightning run text_lenvm --check                                  look at recipe and data, train nothing
  lightning run text_lenvm --fit.help                               every setting there is
"""


def build_parser(program: str) -> argparse.ArgumentParser:
    """Parser of everything but the ``--fit.KEY VALUE`` overrides."""
    parser = argparse.ArgumentParser(
        prog=program, description="Length value models: know at every token how many are still to come."
    )
    parser.add_argument("--version", action="version", version=f"lenvm-lightning {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run",
        help="run a recipe: train a length value model",
        description="Run the stages of a recipe. A run that was interrupted goes on, one that is complete is skipped.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a shipped recipe")
    run.add_argument("--runs", type=Path, default=Path("runs"), help="folder that holds all runs (default: runs)")
    run.add_argument("--name", help="name of the run (default: the recipe's; another number if that is taken)")
    run.add_argument("--check", action="store_true", help="look at recipe and data and report, train nothing")
    run.add_argument("--fresh", action="store_true", help="delete this run and begin again")
    run.add_argument(
        "--fit.KEY",
        dest="_",
        metavar="VALUE",
        help="change a setting of the fit stage, such as --fit.trainer.max_steps",
    )
    return parser


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str | None]]]:
    """Take ``--fit.KEY VALUE`` and ``--fit.KEY=VALUE`` out of a command line.

    Returns:
        What is left, and (key, value) pairs; the value is None where none was given.
    """
    rest: list[str] = []
    overrides: list[tuple[str, str | None]] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--fit.") or word.startswith("--fit.KEY"):
            rest.append(word)
        elif "=" in word:
            key, value = word[2:].split("=", 1)
            overrides.append((key, value))
        else:
            overrides.append((word[2:], words.pop(0) if words and not words[0].startswith("--") else None))
    return rest, overrides


def main(argv: Sequence[str] | None = None, program: str = "lenvm") -> int:
    """Run a command line.

    Returns:
        Exit status: 0 done, 1 interrupted, 2 something the user can mend, 143 stopped by SIGTERM.
    """
    rest, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    arguments = build_parser(program).parse_args(rest)
    from .run import run_recipe  # torch and transformers take seconds to import; --help should not

    try:
        return run_recipe(
            arguments.recipe,
            overrides,
            runs=arguments.runs,
            name=arguments.name,
            check=arguments.check,
            fresh=arguments.fresh,
        )
    except LenVMError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2


def lenvm() -> None:
    """Entry point of ``lenvm``."""
    sys.exit(main(program="lenvm"))


def lightning() -> None:
    """Entry point of ``lightning``."""
    sys.exit(main(program="lightning"))
