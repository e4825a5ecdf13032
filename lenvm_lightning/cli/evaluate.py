"""``lenvm-eval``: measure a generator, with and without a length value model."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from .. import __version__
from ..errors import LenVMError
from ..evaluation.read_settings import default_of, options_of_command_line, parser_of, read_settings
from .main import as_process

_EXAMPLES = """examples:
  lenvm-eval --task lifebench                                            the embedded tiny world
  lenvm-eval --task gsm8k --compare                                      all systems of the task side by side
  lenvm-eval --task lifebench --data data_lite.jsonl --generator Qwen/Qwen2.5-7B-Instruct --lenvm runs/q/model
  lenvm-eval --task vqa --data /my/MathVista --generator http://localhost:8000 --limit 20
  lenvm-eval --task gsm8k --systems base tilt:-20 at-most:128 --n 16
  lenvm-eval --task longbench-write --data longbench_write.jsonl --generator Qwen/Qwen2.5-7B-Instruct
  lenvm-eval --task scaling --runs runs/*

systems: base; for lifebench and longbench-write ours, paper, paper-equal, soft; for problems base+min-p; and controls:
tilt:-5, equal-to:128, at-most:64, at-least:200, each with :hard for the paper's form.
Killed or stopped, the same command goes on.
exit status: 0 done, 3 some completions failed, 2 something to fix, 130 Ctrl-C, 143 SIGTERM
"""


def build_parser() -> argparse.ArgumentParser:
    """Parser of the command line: an option for each setting."""
    parser = argparse.ArgumentParser(
        prog="lenvm-eval",
        description="Measure how long texts get and what that costs: one task, several systems, one report.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lenvm-lightning {__version__}")
    for name, field, meaning in options_of_command_line():
        option = f"--{name.replace('_', '-')}"
        if field.default is False:
            parser.add_argument(option, action="store_true", default=None, help=meaning)
            continue
        parser.add_argument(
            option,
            dest=name,
            metavar=name.upper(),
            required=name == "task",
            nargs="+" if "list" in str(field.type) else None,
            type=parser_of(field),
            help=(meaning + default_of(field)).replace("%", "%%"),
        )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Returns:
        Exit status.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = build_parser().parse_args(words)
    try:
        settings = read_settings(vars(arguments), "this")
        # What needs torch and transformers comes after what can be wrong without them.
        from ..evaluation.evaluate import evaluate
        from ..pipeline.sample_stage import sigterm_exits

        with sigterm_exits():
            found = evaluate(settings, Path("results"), shlex.join(["lenvm-eval", *words]))
    except LenVMError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(found.text)
    print(f"{found.folder}: report.md, results.json, samples.jsonl, plots; tensorboard --logdir {found.folder}")
    return found.status


def lenvm_eval() -> None:
    """Entry point."""
    as_process(main)


if __name__ == "__main__":
    lenvm_eval()
