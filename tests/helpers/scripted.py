"""A generator without torch, and a driver of killed runs.

`python tests/helpers/scripted.py FOLDER KILLS SEED [MODEL]`."""

import functools
import itertools
import os
import random
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from lenvm_lightning.decoding.sampling_params import SamplingParams, completion_seed
from lenvm_lightning.rollouts.generators.interface import Answer, Failure, GeneratedText, Prompt, PromptRequest
from lenvm_lightning.rollouts.sample import sample_rollouts

SAMPLING = SamplingParams(max_tokens=40, seed=3)


class Prompts(list[Prompt]):
    """Prompts with the ids and the description that a loaded set has."""

    @property
    def ids(self) -> list[str]:
        return [prompt.prompt_id for prompt in self]

    @property
    def description(self) -> dict[str, Any]:
        return {"ids": self.ids}


def make_prompts(count: int, with_images: bool = False) -> Prompts:
    prompts = Prompts()
    for i in range(count):
        # Every twentieth is so long that its records span many pages: those are the ones that a kill can tear.
        text = f"Count to {i}. " + "x" * (300_000 if i % 20 == 19 else 5)
        images = (Image.new("RGB", (9, 9), (i % 256, i // 256, 7)),) if with_images else ()
        message = {"role": "user", "content": "<image>" * len(images) + text}
        prompts.append(Prompt(f"p/{i}", [message], images, "test" if i % 10 == 0 else "train", {"answer": str(i)}))
    return prompts


_ORDERS = itertools.count()


class ScriptedGenerator:
    """Random tokens by the completion's seed; answers come in another order every time, as those of a real one do.

    Args:
        seconds: between two answers.
        fails: what becomes of a completion instead, by (prompt_id, number).
    """

    def __init__(self, seconds: float = 0.0, fails: dict[tuple[str, int], Any] | None = None) -> None:
        self.name, self.seconds, self.fails = "scripted", seconds, fails or {}
        self.asked: list[tuple[str, int]] = []
        self.version = 1
        self.tokens_written = 0

    def fingerprint(self) -> dict[str, Any]:
        return {"kind": "scripted", "version": self.version}

    def sample(self, requests: Iterable[PromptRequest], sampling: SamplingParams) -> Iterator[Answer]:
        running: list[tuple[str, int]] = []
        order = random.Random(next(_ORDERS))
        for request in requests:
            running += [(request.prompt.prompt_id, number) for number in request.numbers]
            while len(running) > 12:
                yield self._answer(running.pop(order.randrange(len(running))), sampling)
        while running:
            yield self._answer(running.pop(order.randrange(len(running))), sampling)

    def _answer(self, key: tuple[str, int], sampling: SamplingParams) -> Answer:
        time.sleep(self.seconds)
        self.asked.append(key)
        instead = self.fails.get(key)
        if isinstance(instead, Exception):
            raise instead
        if isinstance(instead, Failure):
            return Answer(*key, instead)
        seed = completion_seed(sampling.seed, *key)
        draw = random.Random(seed)
        ids = [draw.randrange(3, 1000) for _ in range(draw.randrange(1, 60))]
        truncated = len(ids) >= sampling.max_tokens
        ids = ids[: sampling.max_tokens] if truncated else [*ids, 2]
        text = " ".join(map(str, ids)) + " é\n漢"
        self.tokens_written += len(ids)
        return Answer(*key, GeneratedText(text, ids, "length" if truncated else "stop", -1.5 * len(ids), seed))


def run(folder: Path, model: str) -> None:
    """The run that is killed: of the generator above, or of a real model on embedded prompts."""
    if model:
        sample_rollouts(_loaded(model), load_prompts("tiny-math", limit=600), 5, folder, SamplingParams(max_tokens=60))
    else:
        sample_rollouts(ScriptedGenerator(0.0005), make_prompts(300, with_images=True), 4, folder, SAMPLING)


@functools.cache
def _loaded(model: str) -> Any:
    torch.set_num_threads(1)  # so that there are no threads when it forks
    return LocalGenerator.load(model)


def drive(folder: Path, kills: int, seed: int, model: str) -> None:
    """Begin the same run again and again in a process of its own, and kill it at a random moment."""
    moments = random.Random(seed)
    if model:
        _loaded(model)
    journal = folder / "journal.jsonl"
    for kill in range(kills):
        before = _size(journal)
        child = os.fork()
        if child == 0:
            try:
                run(folder, model)
            finally:
                os._exit(1)
        # Every other one while it writes, however slow the machine is to come that far.
        while not model and kill % 2 and _size(journal) == before and os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.001)
        time.sleep(moments.uniform(0.0, 1.0 if model else 0.01 if kill % 2 else 0.1))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "the run ended before it was killed"
    if model and not kills:
        run(folder, model)


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


if __name__ == "__main__":
    MODEL = "".join(sys.argv[4:])
    if MODEL:
        import torch

        from lenvm_lightning.rollouts.generators.local import LocalGenerator
        from lenvm_lightning.rollouts.prompts import load_prompts
    drive(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), MODEL)
    assert MODEL or "torch" not in sys.modules
