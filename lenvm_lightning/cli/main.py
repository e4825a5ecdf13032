"""The commands ``lightning`` and ``lenvm``: parse a line, do what it says, turn errors into sentences."""

import argparse
import atexit
import gc
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType

from .. import __version__
from ..errors import LenVMError
from . import calibrate, convert, export, generate, inspect, plan, predict, run, sample, serve


@dataclass(frozen=True)
class Command:
    """A command: a module with ``EXAMPLES``, ``add_arguments(parser)`` and ``execute(arguments[, overrides])``.

    What it needs is imported when it runs: torch and transformers take seconds, and ``--help`` should not.

    Attributes:
        module: where it is.
        summary: for the list of commands.
        description: for its own help.
        takes_overrides: whether ``--STAGE.KEY VALUE`` may follow.
    """

    module: ModuleType
    summary: str
    description: str
    takes_overrides: bool = False


COMMANDS = {
    "run": Command(
        run,
        "run a recipe: sample rollouts, train a length value model, evaluate",
        "Run the stages of a recipe. A stage that was interrupted goes on, one that is complete is skipped.",
        takes_overrides=True,
    ),
    "plan": Command(
        plan,
        "say what memory and work a recipe's training takes",
        "Parameters, memory and work of a recipe's training, by part, before a weight is loaded.",
        takes_overrides=True,
    ),
    "sample": Command(
        sample,
        "sample rollouts from a generator",
        "Sample completions of prompts: the data that a length value model learns from.",
    ),
    "convert": Command(
        convert,
        "convert rollouts to the published layout, or back",
        "Write rollouts in another layout. Training reads both.",
    ),
    "generate": Command(
        generate,
        "generate text of a target length",
        "Answer a prompt, with a length value model that says after each candidate how much would follow.",
    ),
    "predict": Command(
        predict,
        "predict the length of answers to prompts",
        "Predict how many tokens the answer to each prompt will have, before anything is generated.",
    ),
    "calibrate": Command(
        calibrate,
        "learn how sure a length value model may be",
        "Turn what a length value model predicts into intervals that hold on completions it was not trained on.",
    ),
    "serve": Command(
        serve,
        "serve a model as an OpenAI-compatible server that controls lengths",
        "Answer requests of the OpenAI protocol, each under a control of its length where it names one.",
    ),
    "inspect": Command(
        inspect,
        "show what a length value model thinks at every token",
        "Read completions with a length value model: as JSON, or as a page that colours what moved the length.",
    ),
    "export": Command(
        export,
        "make a model directory out of a run, a checkpoint or an adapter",
        "Write a length value model as a directory of whole weights, or as an adapter with a head.",
    ),
}


def build_parser(program: str) -> argparse.ArgumentParser:
    """Parser of everything but the ``--STAGE.KEY VALUE`` overrides."""
    parser = argparse.ArgumentParser(
        prog=program, description="Length value models: know at every token how many are still to come."
    )
    parser.add_argument("--version", action="version", version=f"lenvm-lightning {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        own = commands.add_parser(
            name,
            help=command.summary,
            description=command.description,
            epilog=command.module.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.module.add_arguments(own)
    return parser


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str | None]]]:
    """Take ``--STAGE.KEY VALUE`` and ``--STAGE.KEY=VALUE`` out of a command line.

    Returns:
        What is left, and (key, value) pairs; the value is None where none was given.
    """
    rest: list[str] = []
    overrides: list[tuple[str, str | None]] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith(("--fit.", "--sample.", "--evaluate.")):
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
        Exit status: 0 done, 2 something the user can fix, 3 done but for completions that failed, 130 stopped by
        Ctrl-C, 141 nobody reads any more, 143 stopped by SIGTERM.
    """
    rest, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    parser = build_parser(program)
    arguments = parser.parse_args(rest)
    command = COMMANDS[arguments.command]
    if overrides and not command.takes_overrides:
        parser.error(f"--{overrides[0][0]} belongs to `{program} run RECIPE`")
    try:
        return command.module.execute(arguments, *([overrides] if command.takes_overrides else []))
    except LenVMError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `… | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def as_process(command: Callable[[], int]) -> None:
    """Run a command and end the process, without a last search for garbage among all that torch brings: seconds."""
    atexit.register(gc.freeze)
    sys.exit(command())


def lenvm() -> None:
    """Entry point of ``lenvm``."""
    as_process(partial(main, program="lenvm"))


def lightning() -> None:
    """Entry point of ``lightning``."""
    as_process(partial(main, program="lightning"))
