"""The commands ``lightning`` and ``lenvm``: parse a line, do what it says, turn errors into sentences."""

import argparse
import atexit
import gc
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING
from functools import partial
from pathlib import Path

from .. import __version__
from ..errors import LenVMError
from .export import EXPORT_EXAMPLES, add_export
from .generate import GENERATE_EXAMPLES, add_generate
from .predict import PREDICT_EXAMPLES, add_predict
from .sample import FIELDS, read_settings, run_sampling

_RUN_EXAMPLES = """examples:
  lightning run recipes/vlm_lenvm.yaml                              the embedded tiny world, images and text
  lightning run text_lenvm --fit.trainer.max_steps 50               a shipped recipe by name, one setting changed
  lightning run text_lenvm --fit.data.files 'rollouts/*.jsonl'      your own rollouts
  lightning run text_lenvm --check                                  look at recipe and data, train nothing
  lightning run text_lenvm --sample.n 16 --sample.limit 200         sample other rollouts before training
  lightning run lifebench --evaluate.limit 5                        a recipe that only measures
  lightning run text_lenvm --fit.help                               every setting there is
"""
_PLAN_EXAMPLES = """examples:
  lenvm plan qwen2.5-1.5b                                           a shipped recipe
  lenvm plan qwen2.5-1.5b --fit.model.backbone DIR                  no hub: DIR needs to hold a config.json only
  lenvm plan qwen2.5-1.5b --fit.trainer.devices 8 --fit.data.batch_tokens 16384
  lenvm plan qwen2.5-1.5b --tflops 300 --tokens 5e8                 hours, at a speed that your devices keep up

No weight is loaded, and the rollouts need not be there: a step is run on tensors that have shapes and no memory.
"""
_SAMPLE_EXAMPLES = """examples:
  lenvm sample --generator tiny-text --prompts tiny-math --limit 100 --out rollouts/math
  lenvm sample --generator Qwen/Qwen2.5-1.5B-Instruct --prompts gsm8k --split train -n 16 --out rollouts/gsm8k
  lenvm sample --generator http://localhost:8000 --prompts questions.jsonl --options '{concurrency: 64}' --out q

Killed or stopped, the same command goes on; where it is complete, it does nothing. OUT/rollouts.jsonl is there when
all is. A server's key is read from $OPENAI_API_KEY.
exit status: 0 every completion is there, 3 some failed (OUT/failures.jsonl), 2 something to fix, 130 Ctrl-C,
143 SIGTERM
"""
_SAMPLE_HELP = {
    "out": "folder of the completions",
    "stop": "a text after which a completion ends; may be given again",
}  # where a command line differs from a recipe
_CONVERT_EXAMPLES = """examples:
  lenvm convert rollouts/math published.jsonl                       one completion a line, those of a prompt together
  lenvm convert rollouts/math published.jsonl --grouped             one prompt a line
  lenvm convert published.jsonl ours.jsonl --to ours                and back; the published layout has no token ids
"""


def build_parser(program: str) -> argparse.ArgumentParser:
    """Parser of everything but the ``--STAGE.KEY VALUE`` overrides."""
    parser = argparse.ArgumentParser(
        prog=program, description="Length value models: know at every token how many are still to come."
    )
    parser.add_argument("--version", action="version", version=f"lenvm-lightning {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_run(commands)
    _add_plan(commands)
    _add_sample(commands)
    _add_convert(commands)
    add_generate(
        _add(
            commands,
            "generate",
            "generate text of a target length",
            "Answer a prompt, with a length value model that says after each candidate how much would follow.",
            GENERATE_EXAMPLES,
        )
    )
    add_predict(
        _add(
            commands,
            "predict",
            "predict the length of answers to prompts",
            "Predict how many tokens the answer to each prompt will have, before anything is generated.",
            PREDICT_EXAMPLES,
        )
    )
    add_export(
        _add(
            commands,
            "export",
            "make a model directory out of a run, a checkpoint or an adapter",
            "Write a length value model as a directory of whole weights, or as an adapter with a head.",
            EXPORT_EXAMPLES,
        )
    )
    return parser


def _add(commands: argparse._SubParsersAction, name: str, short: str, description: str, epilog: str) -> "_Parser":
    return commands.add_parser(
        name,
        help=short,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


_Parser = argparse.ArgumentParser


def _add_run(commands: argparse._SubParsersAction) -> None:
    run = _add(
        commands,
        "run",
        "run a recipe: sample rollouts, train a length value model, evaluate",
        "Run the stages of a recipe. A stage that was interrupted goes on, one that is complete is skipped.",
        _RUN_EXAMPLES,
    )
    run.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a shipped recipe")
    run.add_argument("--runs", type=Path, default=Path("runs"), help="folder that holds all runs (default: runs)")
    run.add_argument("--name", help="name of the run (default: the recipe's; another number if that is taken)")
    run.add_argument("--check", action="store_true", help="look at recipe and data and report, do nothing")
    run.add_argument("--fresh", action="store_true", help="delete this run and train again; rollouts stay")
    for stage, example in (
        ("sample", "--sample.n 16"),
        ("fit", "--fit.trainer.max_steps 50"),
        ("evaluate", "--evaluate.limit 20"),
    ):
        run.add_argument(
            f"--{stage}.KEY",
            dest="_",
            metavar="VALUE",
            help=f"change a setting of the {stage} stage, such as {example}",
        )


def _add_plan(commands: argparse._SubParsersAction) -> None:
    plan = _add(
        commands,
        "plan",
        "say what memory and work a recipe's training takes",
        "Parameters, memory and work of a recipe's training, by part, before a weight is loaded.",
        _PLAN_EXAMPLES,
    )
    plan.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a shipped recipe")
    plan.add_argument("--row-tokens", type=int, metavar="N", help="plan for rows of N tokens, not for the longest")
    plan.add_argument("--tflops", type=float, help="TFLOP/s that a device keeps up, to say how long a step takes")
    plan.add_argument("--tokens", type=float, help="tokens to train on, padding included, to say how long it all takes")
    plan.add_argument("--json", action="store_true", help="everything as one line of JSON")
    plan.add_argument(
        "--fit.KEY", dest="_", metavar="VALUE", help="change a setting, such as --fit.trainer.precision bf16-true"
    )


def _add_sample(commands: argparse._SubParsersAction) -> None:
    sample = _add(
        commands,
        "sample",
        "sample rollouts from a generator",
        "Sample completions of prompts: the data that a length value model learns from.",
        _SAMPLE_EXAMPLES,
    )
    for name, field in FIELDS.items():
        needed = field.default is MISSING or name == "out"
        default = "" if field.default in (None, MISSING, ()) else f" (default: {field.default})"
        several = {"prompts": {"nargs": "+"}, "stop": {"action": "append"}}.get(name, {})
        sample.add_argument(
            *(["-n"] if name == "n" else []),
            *([] if name == "n" else [f"--{name.replace('_', '-')}"]),
            dest=name,
            metavar="TEXT" if name == "stop" else name.upper(),
            required=needed,
            **several,
            type=field.metadata["kind"].parse,
            help=_SAMPLE_HELP.get(name, field.metadata["meaning"]) + default,
        )


def _add_convert(commands: argparse._SubParsersAction) -> None:
    convert = _add(
        commands,
        "convert",
        "convert rollouts to the published layout, or back",
        "Write rollouts in another layout. Training reads both.",
        _CONVERT_EXAMPLES,
    )
    convert.add_argument("source", metavar="SOURCE", help="a folder of `lenvm sample`, or a JSONL file in any layout")
    convert.add_argument("target", type=Path, metavar="TARGET", help="JSONL file to write; must not be there yet")
    convert.add_argument("--to", choices=("published", "ours"), default="published", help="default: published")
    convert.add_argument("--grouped", action="store_true", help="all completions of a prompt on one line")


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
    if overrides and arguments.command not in ("run", "plan"):
        parser.error(f"--{overrides[0][0]} belongs to `{program} run RECIPE`")
    try:
        return _COMMANDS[arguments.command](arguments, overrides)
    except LenVMError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `… | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


# What a command needs is imported when it runs: torch and transformers take seconds, and --help should not.


def _run(arguments: argparse.Namespace, overrides: list[tuple[str, str | None]]) -> int:
    from .run import run_recipe

    return run_recipe(
        arguments.recipe,
        overrides,
        runs=arguments.runs,
        name=arguments.name,
        check=arguments.check,
        fresh=arguments.fresh,
    )


def _plan(arguments: argparse.Namespace, overrides: list[tuple[str, str | None]]) -> int:
    from .plan import run_plan

    return run_plan(arguments, overrides)


def _sample(arguments: argparse.Namespace, _: list[tuple[str, str | None]]) -> int:
    given = {name: getattr(arguments, name) for name in FIELDS}
    if len(arguments.prompts) == 1:
        given["prompts"] = arguments.prompts[0]
    return run_sampling(read_settings(given, "this"))


def _convert(arguments: argparse.Namespace, _: list[tuple[str, str | None]]) -> int:
    from ..rollouts.published_format import convert

    count = convert(Path(arguments.source), arguments.target, to=arguments.to, grouped=arguments.grouped)
    print(f"{arguments.target}: {count:,} completions")
    return 0


def _generate(arguments: argparse.Namespace, _: list[tuple[str, str | None]]) -> int:
    from .generate import run_generate

    return run_generate(arguments)


def _predict(arguments: argparse.Namespace, _: list[tuple[str, str | None]]) -> int:
    from .predict import run_predict

    return run_predict(arguments)


def _export(arguments: argparse.Namespace, _: list[tuple[str, str | None]]) -> int:
    from .export import run_export

    return run_export(arguments)


_COMMANDS = {
    "run": _run,
    "plan": _plan,
    "sample": _sample,
    "convert": _convert,
    "generate": _generate,
    "predict": _predict,
    "export": _export,
}


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
