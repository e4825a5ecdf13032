"""``lenvm inspect``: what a length value model thinks at every token."""

import argparse
import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DataError
from ..models import embedded
from .models import add_models, open_lenvm

if TYPE_CHECKING:
    from ..inspection.read import Written

EXAMPLES = """examples:
  lenvm inspect "The sea was quiet." --prompt "Write a text about the sea." --out sea.html
  lenvm inspect rollouts/mine/rollouts.jsonl --lenvm runs/mine/model --limit 5 --out page.html
  lenvm inspect rollouts/mine/rollouts.jsonl --lenvm runs/mine/model > tokens.jsonl
  lenvm inspect results/lifebench-tiny-text-1a2b3c4d --out page.html

Without --out one JSON object a completion goes to stdout: its tokens, each with what was still to come after it (the
end included), the value, and by how much it moved the expected length. The page is one file that fetches nothing.
"""
_RESULTS = "samples.jsonl"  # in a folder of results


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``lenvm inspect``."""
    parser.add_argument(
        "text", metavar="TEXT", help="a completion, a rollouts.jsonl (or its folder), or a folder of results"
    )
    add_models(parser, "whose completions they are (default: the one the length value model was trained for)")
    parser.add_argument("--prompt", help="what TEXT answers, where it is a completion")
    parser.add_argument("--limit", type=int, default=20, help="only so many completions (default: 20)")
    parser.add_argument("--out", type=Path, metavar="FILE.html", help="write a page to look at")


def execute(arguments: argparse.Namespace) -> int:
    """Print or write what there is to see.

    Returns:
        Exit status: 0.
    """
    file = _rollouts_of(arguments.text)
    if file is None and arguments.prompt is None:
        raise DataError("--prompt is missing: what does this text answer? (No file is called so.)")
    if file is not None and arguments.prompt is not None:
        raise DataError(f"--prompt: {file} holds the prompts of its completions")
    if arguments.out is not None and arguments.out.suffix not in (".html", ".htm"):
        raise DataError(f"--out: {arguments.out} must end in .html")
    if arguments.out is not None and not arguments.out.absolute().parent.is_dir():
        raise DataError(f"--out: there is no folder {arguments.out.absolute().parent}")
    if arguments.limit < 1:
        raise DataError(f"--limit {arguments.limit}: at least 1")
    from ..inspection.page import write_page
    from ..inspection.read import Written, as_json, completions_of, completions_of_results, read_completions
    from ..models.processors import load_processor
    from ..rollouts.generators.interface import Prompt

    if file is None:
        prompt = Prompt("prompt", [{"role": "user", "content": arguments.prompt}])
        given = [Written(prompt, None, arguments.text, "text", truncated=True)]  # nobody says that it ends here
    else:
        completions = completions_of_results(file.parent) if file.name == _RESULTS else completions_of(file)
        given = list(itertools.islice(completions, arguments.limit))
    if not given:
        raise DataError(f"{file} holds no completions")
    known = arguments.generator or embedded.generator_of(arguments.lenvm or "")
    generator = known or _default(given)
    lenvm = open_lenvm(arguments, generator)
    processor = load_processor(known or arguments.lenvm or generator)
    readings = read_completions(lenvm, processor, given)
    if arguments.out is None:
        print(as_json(readings), end="", flush=True)
        return 0
    name = arguments.lenvm or embedded.value_model_of(generator)
    write_page(list(readings), arguments.out, f"{arguments.text if file else 'a text'}, read by {name}")
    print(f"{arguments.out}: {len(given)} completions", file=sys.stderr)
    return 0


def _rollouts_of(text: str) -> Path | None:
    """The file that is meant; None where the text is a text."""
    try:
        path = Path(text)
        for name in ("rollouts.jsonl", _RESULTS):
            if path.is_dir() and (path / name).is_file():
                return path / name
        return path if path.is_file() else None
    except (OSError, ValueError):  # longer than any name of a file, or with characters that none has
        return None


def _default(given: "list[Written]") -> str:
    """The embedded generator that completions are taken for where nobody says."""
    return "tiny-vl" if any(one.prompt.images for one in given) else "tiny-text"
