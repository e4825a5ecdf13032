"""``lenvm generate``: text of a target length."""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..decoding.sampling_params import GUIDED_SAMPLING, SamplingParams
from ..errors import GenerationError
from ..models import embedded
from ..utils.settings import fields_of
from .flags import add_setting
from .models import add_models, open_lenvm

if TYPE_CHECKING:
    from ..decoding.generate import Completion
    from ..guidance import Control
    from ..rollouts.generators.interface import Prompt

EXAMPLES = """examples:
  lenvm generate --equal-to 128 "Write a text about the sea."           the embedded tiny world
  lenvm generate --tilt -10 "Ann has 3 pens and buys 2. How many pens does she have?"
  lenvm generate --image shapes.png --at-most 40 "How many circles are there?"
  lenvm generate --generator Qwen/Qwen2.5-7B-Instruct --lenvm runs/qwen2.5-1.5b/model --at-least 300 "Tell me a story."
  lenvm generate --equal-to 64 --trace page.html "Write a text about the sea."       and how each token was chosen

The text goes to stdout; what is known of its length, while it is written and in the end, to stderr.
"""
_PAGES = (".html", ".htm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``lenvm generate``."""
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="what to answer; read from stdin where left out")
    add_models(parser, "an embedded model, a model directory or a hub id (default: tiny-text; tiny-vl with --image)")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="an image; may be given again")
    length = parser.add_argument_group("length", "at most one of these; without any, the base model")
    control = length.add_mutually_exclusive_group()
    control.add_argument("--equal-to", type=int, metavar="N", help="so many tokens, the end included")
    control.add_argument("--at-most", type=int, metavar="N", help="aim at no more than so many (--max-tokens N cuts)")
    control.add_argument("--at-least", type=int, metavar="N", help="aim at no fewer than so many")
    control.add_argument("--tilt", type=float, metavar="BETA", help="below 0 shorter, above 0 longer; try -5")
    control.add_argument("--control", metavar="TEXT", help="any control as text, such as equal-to:128:hard")
    length.add_argument(
        "--until",
        metavar="TEXT",
        help="beside --equal-to or --at-most: N counts to this text, such as '</think>', and what follows is the base "
        "model's; takes a length value model that was trained so",
    )
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("-n", type=int, default=1, help="completions (default: 1)")
    known = fields_of(SamplingParams)
    limit = f"{known['max_tokens'].metadata['meaning']} (default: twice N, or 512)"
    add_setting(sampling, known["max_tokens"], default=None, help=limit)
    add_setting(sampling, known["temperature"], default=GUIDED_SAMPLING.temperature)
    add_setting(sampling, known["top_k"], default=GUIDED_SAMPLING.top_k)
    add_setting(sampling, known["top_p"], default=GUIDED_SAMPLING.top_p)
    add_setting(sampling, known["min_p"], default=GUIDED_SAMPLING.min_p)
    add_setting(sampling, known["seed"], default=0)
    add_setting(sampling, known["stop"], default=[], action="append", help="end after this text; may be given again")
    parser.add_argument("--compile", action="store_true", help="compile the steps: a minute or more first, then faster")
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="write how each token was chosen: JSON lines, or a page to look at (FILE.html)",
    )


def execute(arguments: argparse.Namespace) -> int:
    """Write what was asked for.

    Returns:
        Exit status: 0, or 3 where a completion failed.
    """
    control = _control(arguments)
    name = arguments.generator or ("tiny-vl" if arguments.image else "tiny-text")
    prompt = sys.stdin.read() if arguments.prompt is None else arguments.prompt
    if not prompt.strip():
        raise GenerationError("PROMPT is empty: say what is to be answered")
    if arguments.trace:
        _make_writable(arguments.trace)
    # What needs torch and transformers comes after what can be wrong without them.
    from ..decoding.generate import generate, stream
    from ..models.processors import tokenizer_of
    from ..rollouts.generators.interface import Prompt
    from ..rollouts.generators.local import LocalGenerator
    from ..rollouts.generators.local.loading import require_same_tokens
    from ..rollouts.prompting import encode_prompt
    from ..utils.images import open_image

    images = [_opened(open_image, image) for image in arguments.image]
    page = arguments.trace is not None and arguments.trace.suffix.lower() in _PAGES
    wanted = control or arguments.lenvm or embedded.value_model_of(name) or page
    lenvm = open_lenvm(arguments, name) if wanted else None
    generator = LocalGenerator.load(name, dtype=arguments.dtype, device=arguments.device)
    tokenizer = tokenizer_of(generator.processor)
    if arguments.lenvm is not None:
        require_same_tokens(tokenizer, arguments.lenvm)
    if images and not hasattr(generator.processor, "image_processor"):
        raise GenerationError(f"--image: {name} reads text only")
    content = "<image>" * (len(images) - prompt.count("<image>")) + prompt
    try:
        ids, vision = encode_prompt(generator.processor, [{"role": "user", "content": content}], images)
    except ValueError as error:
        raise GenerationError(str(error)) from error
    settings: dict[str, Any] = {
        key: getattr(arguments, key)
        for key in ("n", "max_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "stop", "compile")
    }
    settings |= {"control": control, "tokenizer": tokenizer}
    inputs = {"input_ids": _row(ids), **vision} if vision else [ids]
    if notice := embedded.notice(name):
        print(notice, file=sys.stderr)
    if arguments.n == 1 and not arguments.trace:
        return _show_stream(stream(generator.model, lenvm, inputs, **settings), tokenizer, control)
    began = time.perf_counter()
    completions = generate(generator.model, lenvm, inputs, trace=arguments.trace is not None, **settings)
    seconds = time.perf_counter() - began
    for completion in completions:
        print(tokenizer.decode(completion.token_ids, skip_special_tokens=True), flush=True)
        print(_summary(completion.token_ids, completion.finish_reason, control, None), file=sys.stderr)
    if arguments.trace:
        asked = Prompt("prompt", [{"role": "user", "content": content}], tuple(arguments.image))
        _write_trace(arguments.trace, asked, completions, tokenizer, lenvm, f"{name} under {control or 'no control'}")
        print(f"{arguments.trace}: how each token was chosen", file=sys.stderr)
    total = sum(len(completion.token_ids) for completion in completions)
    print(f"{total:,} tokens, {total / seconds:,.0f} tokens/s", file=sys.stderr)
    return 3 if any(completion.finish_reason == "error" for completion in completions) else 0


def _control(arguments: argparse.Namespace) -> "Control | None":
    """The control that was asked for.

    Raises:
        GenerationError: a number that means nothing.
    """
    if arguments.until is not None and arguments.equal_to is None and arguments.at_most is None:
        raise GenerationError("--until goes with --equal-to or --at-most (in --control: at-most:64:until=TEXT)")
    if arguments.control is not None:
        from ..decoding.control_text import parse_control

        return parse_control(arguments.control)
    numbers = {name: getattr(arguments, name) for name in ("equal_to", "at_most", "at_least", "tilt")}
    given = [(name, number) for name, number in numbers.items() if number is not None]
    if not given:
        return None
    from ..guidance import AtLeast, AtMost, EqualTo, Tilt

    kinds: dict[str, Any] = {"equal_to": EqualTo, "at_most": AtMost, "at_least": AtLeast, "tilt": Tilt}
    [(name, number)] = given
    try:
        return kinds[name](number) if arguments.until is None else kinds[name](number, until=arguments.until)
    except ValueError as error:
        raise GenerationError(f"--{name.replace('_', '-')}: {error}") from error


def _make_writable(trace: Path) -> None:
    """Find out whether a file can be written, and leave none behind that was not there."""
    try:
        trace.parent.mkdir(parents=True, exist_ok=True)
        is_new = not trace.exists()
        with trace.open("a", encoding="utf-8"):
            pass
        if is_new:
            trace.unlink()
    except OSError as error:
        raise GenerationError(f"--trace: {error}") from error


def _write_trace(
    file: Path, prompt: "Prompt", completions: "list[Completion]", tokenizer: Any, lenvm: Any, title: str
) -> None:
    """How each token was chosen: as JSON lines, or as a page.

    Raises:
        GenerationError: it cannot be written.
    """
    from ..inspection.page import write_page
    from ..inspection.traced import readings_of_traces

    try:
        if file.suffix.lower() in _PAGES:
            write_page(list(readings_of_traces(prompt, completions, tokenizer, lenvm.gamma)), file, title)
            return
        lines = [
            json.dumps({"completion": completion.index, "text": tokenizer.decode([step.token_id]), **asdict(step)})
            for completion in completions
            for step in completion.trace or []
        ]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise GenerationError(f"--trace: {file} cannot be written: {error.strerror or error}") from error


def _opened(open_image: Any, image: str) -> Any:
    try:
        return open_image(image)
    except ValueError as error:
        raise GenerationError(f"--image: {error}") from error


def _row(ids: list[int]) -> Any:
    import torch

    return torch.tensor([ids])


def _show_stream(tokens: Any, tokenizer: Any, control: "Control | None") -> int:
    """Print text as it is written, and beside it on a terminal what remains."""
    from ..decoding.text_stream import TextStream

    ids: list[int] = []
    text, began, finish = TextStream(tokenizer), time.perf_counter(), None
    first: float | None = None
    for token in tokens:
        if token.token_id >= 0:
            ids.append(token.token_id)
        finish = token.finish_reason
        if first is None and token.remaining is not None:
            first = token.remaining + 1
        print(text.add(token.token_id, last=finish is not None), end="", flush=True)
        if token.remaining is not None:
            _show_remaining(f"{len(ids)} written, about {token.remaining:.0f} to come")
    _show_remaining("")
    print(flush=True)
    speed = len(ids) / (time.perf_counter() - began)
    print(f"{_summary(ids, finish, control, first)}, {speed:,.0f} tokens/s", file=sys.stderr)
    return 3 if finish == "error" else 0


def _show_remaining(told: str) -> None:
    """Put it where the next one, or the next piece of text, takes its place; on a terminal only."""
    if not sys.stderr.isatty():
        return
    # After the text, with the cursor kept where it goes on; or over what was told before.
    after = f"\0337\033[K{f'  ({told})' if told else ''}\0338"
    told = after if sys.stdout.isatty() else f"\r{told}\033[K"
    print(told, end="", file=sys.stderr, flush=True)


def _summary(ids: list[int], finish: str | None, control: "Control | None", expected: float | None) -> str:
    told = f"{len(ids)} tokens"
    if control is not None:
        told += f" under {control}"
    if expected is not None:
        told += f", {expected:.0f} expected after the first"
    return told + {"length": ", truncated", "error": ", failed: the models gave no number"}.get(finish or "", "")
