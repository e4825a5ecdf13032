"""``lenvm predict``: the length of text that is not written yet."""

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from ..models import embedded
from ..pipeline.sample_stage import FIELDS
from .flags import ALLOW_IMAGES_FROM, add_setting
from .models import add_models, open_lenvm

EXAMPLES = """examples:
  lenvm predict tiny-math --limit 5                                     the embedded tiny world
  lenvm predict prompts.jsonl --lenvm runs/text_lenvm/model > lengths.jsonl
  lenvm predict tiny-math --limit 5 --quantiles .5,.9                   how sure that is
  lenvm predict prompts.jsonl --lenvm runs/mine/model --format vllm --served-model Qwen/Qwen3-8B > batch.jsonl

One JSON object a prompt goes to stdout: prompt_id, expected_tokens (the end included), or error. With --quantiles it
has quantiles, too: the tokens that such a share of completions stays within; null where training saw too few that
long. With --format vllm or dynamo it is a line of a batch file, by which the server's scheduler knows the expected
length (with --quantiles the first of them); prompts without one are told on stderr.
"""

if TYPE_CHECKING:
    from ..evaluation.prediction import Prediction
    from ..rollouts.generators.interface import Prompt


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``lenvm predict``."""
    parser.add_argument("prompts", metavar="PROMPTS", help="a JSONL file, an embedded set, or a data set by name")
    add_models(parser, "whose tokenizer to use, where the length value model's folder has none")
    parser.add_argument("--split", help="only prompts of this split")
    add_setting(parser, FIELDS["allow_images_from"], **ALLOW_IMAGES_FROM)
    parser.add_argument("--limit", type=int, help="only so many prompts")
    parser.add_argument(
        "--format",
        choices=("jsonl", "vllm", "dynamo"),
        default="jsonl",
        help="jsonl: expected lengths; vllm: requests with it as their priority (lower first, for a server with "
        "--scheduling-policy priority); dynamo: as nvext.agent_hints.osl",
    )
    parser.add_argument(
        "--quantiles", metavar="Q,Q", type=_levels, default=(), help="levels between 0 and 1, such as .5,.9"
    )
    parser.add_argument("--served-model", metavar="NAME", help="what the server of --format calls its model")


def execute(arguments: argparse.Namespace) -> int:
    """Print the expected lengths.

    Returns:
        Exit status: 0, or 3 where a prompt has none.
    """
    if (arguments.format == "jsonl") != (arguments.served_model is None):
        raise DataError("--format vllm and dynamo need --served-model, which others do not take")
    from ..evaluation.prediction import predict_lengths
    from ..models.processors import load_processor
    from ..rollouts.prompts import load_prompts

    prompts = load_prompts(
        arguments.prompts, split=arguments.split, limit=arguments.limit, allow_images_from=arguments.allow_images_from
    )
    guess = "tiny-vl" if arguments.prompts == "tiny-vqa" else "tiny-text"
    generator = arguments.generator or embedded.generator_of(arguments.lenvm or "")
    lenvm = open_lenvm(arguments, generator or guess)
    if lenvm.config.until is not None and arguments.format != "jsonl":
        raise DataError(
            f"--format {arguments.format} tells lengths of whole answers, and this length value model counts to "
            f"{lenvm.config.until!r}: name another with --lenvm"
        )
    processor = load_processor(generator or arguments.lenvm or guess)
    status = 0
    for prompt, found in predict_lengths(lenvm, processor, prompts, quantiles=arguments.quantiles):
        told = _told(arguments, prompt, found)
        failed = "error" in told
        print(json.dumps(told), file=sys.stderr if failed and arguments.format != "jsonl" else sys.stdout, flush=True)
        status = 3 if failed else status
    return status


def _levels(text: str) -> tuple[float, ...]:
    """Levels of quantiles, as they are typed."""
    levels = tuple(float(word) for word in text.split(","))
    if not all(0.0 < level < 1.0 for level in levels):
        raise argparse.ArgumentTypeError(f"levels lie between 0 and 1, such as .5,.9; got {text!r}")
    return levels


def _told(arguments: argparse.Namespace, prompt: "Prompt", found: "Prediction | str") -> dict[str, Any]:
    """The line of a prompt: its expected length, a request that tells it, or why there is neither."""
    if isinstance(found, str):
        return {"prompt_id": prompt.prompt_id, "error": found}
    if arguments.format == "jsonl":
        told: dict[str, Any] = {"prompt_id": prompt.prompt_id, "expected_tokens": round(found.expected_tokens, 1)}
        if found.quantiles:
            told["quantiles"] = {repr(q): n if n is None else round(n, 1) for q, n in found.quantiles.items()}
        return told
    tokens = next(iter(found.quantiles.values()), found.expected_tokens)
    if tokens is None:
        return {"prompt_id": prompt.prompt_id, "error": "this quantile is not known: training saw too few that long"}
    from ..serving.scheduled_requests import scheduled_request

    try:
        return scheduled_request(prompt, tokens, arguments.format, arguments.served_model)
    except ValueError as error:
        return {"prompt_id": prompt.prompt_id, "error": str(error)}
