"""``lenvm predict``: the length of text that is not written yet."""

import argparse
import json
from typing import Any

from ..models import embedded
from ..pipeline.sample_stage import FIELDS
from .flags import ALLOW_IMAGES_FROM, add_setting
from .models import add_models, open_lenvm

EXAMPLES = """examples:
  lenvm predict tiny-math --limit 5                                     the embedded tiny world
  lenvm predict prompts.jsonl --lenvm runs/text_lenvm/model > lengths.jsonl

One JSON object a prompt goes to stdout: prompt_id, expected_tokens (the end included), or error.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``lenvm predict``."""
    parser.add_argument("prompts", metavar="PROMPTS", help="a JSONL file, an embedded set, or a data set by name")
    add_models(parser, "whose tokenizer to use, where the length value model's folder has none")
    parser.add_argument("--split", help="only prompts of this split")
    add_setting(parser, FIELDS["allow_images_from"], **ALLOW_IMAGES_FROM)
    parser.add_argument("--limit", type=int, help="only so many prompts")


def execute(arguments: argparse.Namespace) -> int:
    """Print the expected lengths.

    Returns:
        Exit status: 0, or 3 where a prompt has none.
    """
    from ..evaluation.prediction import predict_lengths
    from ..models.processors import load_processor
    from ..rollouts.prompts import load_prompts

    prompts = load_prompts(
        arguments.prompts, split=arguments.split, limit=arguments.limit, allow_images_from=arguments.allow_images_from
    )
    guess = "tiny-vl" if arguments.prompts == "tiny-vqa" else "tiny-text"
    generator = arguments.generator or embedded.generator_of(arguments.lenvm or "")
    lenvm = open_lenvm(arguments, generator or guess)
    processor = load_processor(generator or arguments.lenvm or guess)
    status = 0
    for prompt, found in predict_lengths(lenvm, processor, prompts):
        told: dict[str, Any] = {"error": found} if isinstance(found, str) else {"expected_tokens": round(found, 1)}
        print(json.dumps({"prompt_id": prompt.prompt_id, **told}), flush=True)
        status = 3 if isinstance(found, str) else status
    return status
