r"""Writes rollouts of the tiny world: several answers to a prompt, with their tokens, as a sampler returns them.

The answers come from the scripts in `arithmetic` and `shapes`, not from a model, so that a few seconds give data whose
lengths are uncertain yet partly predictable. A line of `rollouts.jsonl` is one completion:

    {"prompt_id": "tiny-math-17", "messages": [{"role": "user", "content": "..."}], "images": ["images/17.png"],
     "completion": "...", "token_ids": [...], "finish_reason": "stop", "sampling": {...},
     "generator": "tinyworld-script", "split": "train"}

`<image>` in a message's content stands for an image; the paths of the images are relative to the file, and there is
no `images` in the text kind. `token_ids` are what was generated, with the end token when `finish_reason` is "stop".
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Literal

from PIL import Image
from tokenizers import Tokenizer

from lenvm_lightning.tinyworld import arithmetic, path, shapes
from lenvm_lightning.tinyworld.corpus import split

GENERATOR = "tinyworld-script"
MAX_TOKENS = {"text": 384, "vision": 256}  # truncates the longest few answers in a hundred
END_TOKEN = "<|im_end|>"

_KINDS = {"text": (arithmetic, "tiny-math", "tiny-text"), "vision": (shapes, "tiny-vqa", "tiny-vl")}


def write_rollouts(
    kind: Literal["text", "vision"], folder: Path, prompts: int = 600, completions: int = 4, seed: int = 0
) -> Path:
    """Write `folder`/rollouts.jsonl, and for "vision" `folder`/images/*.png.

    Equal arguments give equal files, and a folder that already holds them is left as it is. Every file takes its name
    only when it is whole, and settings.json, by which a finished folder is known, comes last.

    Returns:
        The path of rollouts.jsonl, of `prompts` x `completions` lines.
    """
    folder = Path(folder)
    target, settings_file = folder / "rollouts.jsonl", folder / "settings.json"
    settings = {"kind": kind, "prompts": prompts, "completions": completions, "seed": seed, "sources": _sources(kind)}
    if target.exists() and _read_settings(settings_file) == settings:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    settings_file.unlink(missing_ok=True)
    lines = []
    for record, image in generate(kind, prompts, completions, seed):
        if image is not None:
            _save(image, folder / record["images"][0])
        lines.append(json.dumps(record) + "\n")
    _write("".join(lines), target)
    _write(json.dumps(settings, indent=2) + "\n", settings_file)
    return target


def generate(kind: str, prompts: int, completions: int, seed: int) -> Iterator[tuple[dict, Image.Image | None]]:
    """Yield the records in order; with the first completion of a vision prompt comes its image."""
    module, prefix, model = _KINDS[kind]
    tokenizer = Tokenizer.from_file(str(path(model) / "tokenizer.json"))
    seen: set[str] = set()
    for index in range(prompts):
        rng = Random(f"{kind} {seed} {index}")
        problem = module.draw_problem(rng)
        while repr(problem) in seen:
            problem = module.draw_problem(rng)
        seen.add(repr(problem))
        head = {
            "prompt_id": f"{prefix}-{index}",
            "messages": [{"role": "user", "content": problem.prompt}],
            **({"images": [f"images/{index}.png"]} if kind == "vision" else {}),
        }
        for number in range(completions):
            completion_seed = (seed * prompts + index) * completions + number
            text = module.draw_solution(Random(f"{kind} solution {completion_seed}"), problem)
            completion, token_ids, finish_reason = truncate(tokenizer, text, MAX_TOKENS[kind])
            record = {
                **head,
                "completion": completion,
                "token_ids": token_ids,
                "finish_reason": finish_reason,
                "sampling": {"temperature": 1.0, "top_p": 1.0, "max_tokens": MAX_TOKENS[kind], "seed": completion_seed},
                "generator": GENERATOR,
                "split": split(problem.content),
            }
            yield record, shapes.paint(problem) if kind == "vision" and number == 0 else None


def truncate(tokenizer: Tokenizer, text: str, max_tokens: int) -> tuple[str, list[int], str]:
    """Tokenize a whole answer and stop it as a sampler does, at the end token or after `max_tokens` tokens.

    Returns:
        The text, the token ids (the end token among them if it was reached) and the finish reason.
    """
    end = tokenizer.token_to_id(END_TOKEN)
    assert end is not None, f"{END_TOKEN} is part of the shipped tokenizers"
    ids = [*tokenizer.encode(text).ids, end]
    if len(ids) <= max_tokens:
        return text, ids, "stop"
    return tokenizer.decode(ids[:max_tokens]), ids[:max_tokens], "length"


def _sources(kind: str) -> str:
    """Digest what the rollouts are made from, so that a changed script or tokenizer makes new ones."""
    module, _, model = _KINDS[kind]
    parts = [Path(__file__), Path(str(module.__file__)), path(model) / "tokenizer.json"]
    return hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()


def _read_settings(file: Path) -> dict | None:
    """Read what a finished folder was made with; None if it is not finished."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _write(text: str, file: Path) -> None:
    """Write a text file under another name first, one for each process."""
    part = file.with_name(f".{file.name}.{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    part.replace(file)


def _save(image: Image.Image, file: Path) -> None:
    """Save a PNG under another name first, one for each process."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{os.getpid()}")
    image.save(part, format="PNG")
    part.replace(file)
