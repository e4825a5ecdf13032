"""``lenvm sample``: rollouts from a generator."""

import argparse
from typing import Any

from ..pipeline.sample_stage import FIELDS, read_settings, run_sampling
from .flags import ALLOW_IMAGES_FROM, add_setting

EXAMPLES = """examples:
  lenvm sample --generator tiny-text --prompts tiny-math --limit 100 --out rollouts/math
  lenvm sample --generator Qwen/Qwen2.5-1.5B-Instruct --prompts gsm8k --split train -n 16 --out rollouts/gsm8k
  lenvm sample --generator http://localhost:8000 --prompts questions.jsonl --options '{concurrency: 64}' --out q
  lenvm sample --generator tiny-text --prompts tiny-math --longest-first --abort-at-quantile .9 --out rollouts/batch

Killed or stopped, the same command goes on; where it is complete, it does nothing. OUT/rollouts.jsonl is there when
all is. A server's key is read from $OPENAI_API_KEY and sent to that server alone.
exit status: 0 every completion is there, 3 some failed (OUT/failures.jsonl), 2 something to fix, 130 Ctrl-C,
143 SIGTERM
"""

_SPECIAL: dict[str, dict[str, Any]] = {
    "n": {"flag": "-n"},
    "prompts": {"nargs": "+"},
    "stop": {"action": "append", "metavar": "TEXT", "help": "a text after which a completion ends; may be given again"},
    "allow_images_from": ALLOW_IMAGES_FROM,
    "out": {"required": True, "help": "folder of the completions"},
}  # where a command line differs from a recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``lenvm sample``: a flag for each setting."""
    for name, field in FIELDS.items():
        if name == "longest_first":
            flag = "--longest-first"
            parser.add_argument(flag, action="store_true", default=None, help=field.metadata["meaning"])
        else:
            add_setting(parser, field, **_SPECIAL.get(name, {}))


def execute(arguments: argparse.Namespace) -> int:
    """Sample; exit status."""
    given = {name: getattr(arguments, name) for name in FIELDS}
    if len(arguments.prompts) == 1:
        given["prompts"] = arguments.prompts[0]
    return run_sampling(read_settings(given, "this"))
