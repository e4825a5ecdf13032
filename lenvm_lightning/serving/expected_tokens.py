"""How long the answers to requests that wait will be, read off their prompts before they are started."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from ..guidance import AtLeast, AtMost, innermost, target_of
from ..models.value_model import LengthValueModel
from ..utils.threads import is_small, one_thread
from .engine_loop import Job

_BATCH_TOKENS = 1024  # padded, of one forward: as many as the engine prefills at once
_TO_PAD = 0  # any id: nothing sees what stands on the right


@torch.inference_mode()
def expected_tokens(lenvm: LengthValueModel, jobs: Sequence[Job]) -> list[float]:
    """Tokens that requests are expected to take, all completions of one together: of the first few, by one forward.

    Args:
        lenvm: in eval mode; nobody else uses it meanwhile.
        jobs: that wait, at least one.

    Returns:
        Tokens of ``jobs[0]``, ``jobs[1]``, … as far as one forward reads; at most ``max_tokens`` a completion, and that
        many where the prompt cannot be read or the model gives no number: what is wrong is said when it is started.
    """
    batch = _first_batch(jobs)
    with one_thread(is_small(lenvm.backbone)):
        remaining = list(_remaining(lenvm, batch))
    return [len(job.seeds) * _bounded(job, tokens) for job, tokens in zip(batch, remaining, strict=True)]


def _first_batch(jobs: Iterable[Job]) -> list[Job]:
    """The first requests that are read by one forward: texts of so many tokens, or one request with images."""
    batch: list[Job] = []
    widest = 0
    for job in jobs:
        widest = max(widest, len(job.prompt_ids))
        if batch and (job.inputs or widest * (len(batch) + 1) > _BATCH_TOKENS):
            break
        batch.append(job)
        if job.inputs:
            break
    return batch


def _remaining(lenvm: LengthValueModel, jobs: Sequence[Job]) -> Iterator[float]:
    """Tokens that follow each prompt, of the base model; NaN where it cannot be read."""
    try:
        logits = lenvm(**_inputs(lenvm, jobs))  # (B, T)
    except Exception:  # a prompt's own fault, or memory: the engine meets the same, and tells it
        for job in jobs:  # one by one, to find those that cannot be read
            yield from [math.nan] if len(jobs) == 1 else _remaining(lenvm, [job])
        return
    last = torch.tensor([len(job.prompt_ids) - 1 for job in jobs], device=logits.device)
    yield from lenvm.remaining(logits.gather(1, last[:, None])[:, 0]).tolist()


def _inputs(lenvm: LengthValueModel, jobs: Sequence[Job]) -> dict[str, Any]:
    if jobs[0].inputs:
        return jobs[0].inputs
    columns = itertools.zip_longest(*(job.prompt_ids for job in jobs), fillvalue=_TO_PAD)
    ids = torch.tensor(list(columns), device=lenvm.backbone.device).T
    lengths = torch.tensor([len(job.prompt_ids) for job in jobs], device=ids.device)
    mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]  # (B, T), True = a token of the prompt
    return {"input_ids": ids.contiguous(), "attention_mask": mask.long()}


def _bounded(job: Job, remaining: float) -> float:
    """What a completion comes to under its control and its limit."""
    most, target, control = float(job.params.max_tokens), target_of(job.control), innermost(job.control)
    tokens = remaining if math.isfinite(remaining) else most
    if target is not None:
        if isinstance(control, AtMost):
            tokens = min(tokens, target)
        elif isinstance(control, AtLeast):
            tokens = max(tokens, target)
        else:
            tokens = target
    return min(tokens, most)
