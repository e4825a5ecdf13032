"""Calibrate a length value model that is there already, on completions that it was not trained on."""

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from datamodules.tokenise import encode_completion, learned_part

from ..batch import LengthBatch, label_states
from ..distributions.conformal import FEWEST_PROMPTS, Calibration, calibration_to_plain
from ..errors import DataError
from ..inspection.rollout_values import values_of
from ..models.processors import tokenizer_of
from ..models.value_head_io import CONFIG_FILE
from ..models.value_model import LengthValueModel
from ..rollouts.generators.interface import Prompt
from ..rollouts.record import Rollout
from ..training.metrics import HeldOutScores, calibration_of
from ..utils.reading import read_json_object


def calibrate_on(lenvm: LengthValueModel, processor: Any, rollouts: Iterable[Rollout]) -> Calibration:
    """The calibration that the end of a training would make of these completions.

    Args:
        lenvm: in eval mode.
        processor: tokenizer or processor of its vocabulary.
        rollouts: that it was not trained on, of at least 20 prompts.

    Raises:
        DataError: one cannot be read, there are too few prompts, or the model gives no numbers.
    """
    given = list(_completions(lenvm, tokenizer_of(processor), rollouts))
    numbers = {key: number for number, key in enumerate(dict.fromkeys(prompt.prompt_id for prompt, *_ in given))}
    if len(numbers) < FEWEST_PROMPTS:
        raise DataError(
            f"{len(numbers)} prompts are too few to calibrate on: take completions of {FEWEST_PROMPTS} or more"
        )
    scores = HeldOutScores()
    pairs = ((prompt, ids) for prompt, ids, _ in given)
    for number, outputs in values_of(lenvm, processor, pairs, all_heads=True):
        prompt, ids, truncated = given[number]
        if isinstance(outputs, str):
            raise DataError(f"prompt {prompt.prompt_id!r} cannot be read: {outputs}")
        remaining, mask = label_states(1, len(ids), len(ids), len(ids) + 1)
        batch: Any = {
            "remaining": remaining[None],
            "mask": mask[None],
            "censored": torch.tensor([truncated]),
            "prompt_index": torch.tensor([numbers[prompt.prompt_id]]),
        }
        _update(scores, lenvm, outputs[None], batch)
    found = calibration_of(scores.compute())
    if found is None:
        raise DataError("the length value model gives no numbers for these completions: it is broken")
    return found


def write_calibration(lenvm: LengthValueModel, folder: Path, calibration: Calibration) -> None:
    """Store it in the folder that a length value model was loaded from; whatever else its config says stays.

    Raises:
        DataError: the folder cannot be written.
    """
    file = folder / CONFIG_FILE
    before = read_json_object(file) if file.is_file() else dataclasses.asdict(lenvm.config)
    config = {**before, "gamma": lenvm.gamma, "calibration": calibration_to_plain(calibration)}
    part = folder / f".{CONFIG_FILE}"
    try:
        part.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        os.replace(part, file)
    except OSError as error:
        raise DataError(f"{file} cannot be written: {error}") from error


def _completions(
    lenvm: LengthValueModel, tokenizer: Any, rollouts: Iterable[Rollout]
) -> Iterator[tuple[Prompt, list[int], bool]]:
    """Prompt, ids up to what the model counts to, and whether that was truncated; as training reads them."""
    prompts: dict[str, Prompt] = {}
    for rollout in rollouts:
        prompt = Prompt(rollout.prompt_id, rollout.messages, tuple(rollout.images))
        try:
            ids = encode_completion(tokenizer, rollout)
        except ValueError as error:
            raise DataError(f"a completion of prompt {rollout.prompt_id!r} cannot be read: {error}") from error
        ids, truncated = learned_part(ids, rollout.censored, lenvm.config.until, tokenizer)
        yield prompts.setdefault(rollout.prompt_id, prompt), ids, truncated


def _update(scores: HeldOutScores, lenvm: LengthValueModel, outputs: torch.Tensor, batch: LengthBatch) -> None:
    distribution = lenvm.distribution(outputs) if lenvm.length_rule is not None else None
    scores.update(lenvm.remaining(outputs[..., 0]), distribution, batch)
