"""Calibrate a length value model that is there already, on completions that it was not trained on."""

import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ..batch import LengthBatch, label_states
from ..distributions.conformal import Calibration, calibration_to_plain
from ..errors import DataError
from ..inspection.read import Written
from ..inspection.rollout_values import values_of
from ..models.processors import tokenizer_of
from ..models.value_head_io import CONFIG_FILE
from ..models.value_model import LengthValueModel
from ..training.metrics import HeldOutScores, calibration_of


def calibrate_on(lenvm: LengthValueModel, processor: Any, completions: Iterable[Written]) -> Calibration:
    """The calibration that the end of a training would make, from these completions.

    Args:
        lenvm: in eval mode.
        processor: tokenizer or processor of its vocabulary.
        completions: that it was not trained on, of at least 20 prompts.

    Raises:
        DataError: one cannot be read, or there are too few prompts.
    """
    tokenizer = tokenizer_of(processor)
    given = [(one, _ids(tokenizer, one)) for one in completions]
    numbers: dict[str, int] = {}
    scores = HeldOutScores()
    pairs = ((one.prompt, ids) for one, ids in given)
    for number, outputs in values_of(lenvm, processor, pairs, all_heads=True):
        one, ids = given[number]
        if isinstance(outputs, str):
            raise DataError(f"prompt {one.prompt.prompt_id!r} cannot be read: {outputs}")
        remaining, mask = label_states(1, len(ids), len(ids), len(ids) + 1)
        prompt = numbers.setdefault(one.prompt.prompt_id, len(numbers))
        batch: Any = {
            "remaining": remaining[None],
            "mask": mask[None],
            "censored": torch.tensor([one.truncated]),
            "prompt_index": torch.tensor([prompt]),
        }
        _update(scores, lenvm, outputs[None], batch)
    found = calibration_of(scores.compute())
    if found is None:
        raise DataError(f"{len(numbers)} prompts are too few to calibrate on: take completions of 20 or more")
    return found


def write_calibration(lenvm: LengthValueModel, folder: Path, calibration: Calibration) -> None:
    """Store it in the folder that a length value model was loaded from.

    Raises:
        DataError: the folder cannot be written.
    """
    config = dataclasses.replace(lenvm.config, calibration=calibration_to_plain(calibration))
    part = folder / f".{CONFIG_FILE}"
    try:
        part.write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n", encoding="utf-8")
        os.replace(part, folder / CONFIG_FILE)
    except OSError as error:
        raise DataError(f"{folder / CONFIG_FILE} cannot be written: {error}") from error


def _ids(tokenizer: Any, one: Written) -> list[int]:
    return one.token_ids if one.token_ids is not None else tokenizer(one.text, add_special_tokens=False)["input_ids"]


def _update(scores: HeldOutScores, lenvm: LengthValueModel, outputs: torch.Tensor, batch: LengthBatch) -> None:
    distribution = lenvm.distribution(outputs) if lenvm.length_rule is not None else None
    scores.update(lenvm.remaining(outputs[..., 0]), distribution, batch)
