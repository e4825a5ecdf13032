"""``lenvm convert``: rollouts in the published layout, and back."""

import argparse
from pathlib import Path

EXAMPLES = """examples:
  lenvm convert rollouts/math published.jsonl                       one completion a line, those of a prompt together
  lenvm convert rollouts/math published.jsonl --grouped             one prompt a line
  lenvm convert published.jsonl ours.jsonl --to ours                and back; the published layout has no token ids
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``lenvm convert``."""
    parser.add_argument("source", metavar="SOURCE", help="a folder of `lenvm sample`, or a JSONL file in any layout")
    parser.add_argument("target", type=Path, metavar="TARGET", help="JSONL file to write; must not be there yet")
    parser.add_argument("--to", choices=("published", "ours"), default="published", help="default: published")
    parser.add_argument("--grouped", action="store_true", help="all completions of a prompt on one line")


def execute(arguments: argparse.Namespace) -> int:
    """Convert; exit status."""
    from ..rollouts.published_format import convert

    count = convert(Path(arguments.source), arguments.target, to=arguments.to, grouped=arguments.grouped)
    print(f"{arguments.target}: {count:,} completions")
    return 0
