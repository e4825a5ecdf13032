"""Whether a model says in rows of a `KVCache` what it says on its own: checked once for each model.

Most families do, to the last bit. Those that take positions from where keys lie (ALiBi), or have masks of their own,
would be silently wrong.
"""

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import GenerationError
from ..models.value_model import LengthValueModel
from .candidate_scorer import CandidateScorer
from .kv_cache import FEWEST_ROWS
from .model_runner import ModelRunner

_LARGEST_DIFFERENCE = {torch.float64: 1e-6, torch.float32: 1e-3}  # of values, or of distributions; else:
_LARGEST_DIFFERENCE_OF_HALF = 0.1  # what bfloat16 rounds; models that are wrong differ by more
_PROMPT, _CANDIDATES = list(range(10, 22)), [23, 24, 25]  # tokens that mean nothing, in every vocabulary
_found: WeakKeyDictionary[nn.Module, dict[Any, str | None]] = WeakKeyDictionary()  # why not, by dtype and inputs


def open_runner(generator: PreTrainedModel, compiled: bool = False) -> ModelRunner:
    """A generator, ready to decode in rows.

    Args:
        generator: with a vocabulary head.
        compiled: see `ModelRunner`. What is checked is the model as it is: to compile for that would take as long as
            for the steps themselves.

    Raises:
        GenerationError: it does not work so.
    """

    def difference() -> float:
        return difference_in_rows(ModelRunner(generator), _PROMPT, {})

    return _opened("generator", generator, generator.dtype, lambda: ModelRunner(generator, compiled), difference)


def open_scorer(lenvm: LengthValueModel, fewest_rows: int = 1, compiled: bool = False) -> CandidateScorer:
    """A length value model, ready to score candidates in rows.

    Args:
        lenvm: in eval mode.
        fewest_rows: see `CandidateScorer`.
        compiled: see `open_runner`.

    Raises:
        GenerationError: it does not work so.
    """

    def difference() -> float:
        return _difference_of_values(lenvm)

    dtype = next(lenvm.parameters()).dtype
    return _opened("lenvm", lenvm, dtype, lambda: CandidateScorer(lenvm, fewest_rows, compiled), difference)


def _opened(
    who: str, model: nn.Module, dtype: torch.dtype, build: Callable[[], Any], difference: Callable[[], float]
) -> Any:
    reason = None
    try:
        opened = build()
        if not model.training:  # dropout would tell it apart from itself
            reason = _reason(model, dtype, difference)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a family does that works otherwise
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    if reason:
        name = type(model.backbone if isinstance(model, LengthValueModel) else model).__name__
        raise GenerationError(f"{who}: {name} cannot be decoded in rows of a cache: {reason}")
    return opened


def why_not_with_images(runner: ModelRunner, prompt_ids: Sequence[int], inputs: dict[str, Any]) -> str | None:
    """Why a generator cannot be decoded in rows after a prompt with images; None where it can.

    Args:
        runner: of the generator.
        prompt_ids: at least two tokens.
        inputs: what the model takes for them, see `ModelRunner.prefill_inputs`.
    """
    return _reason(runner.model, (runner.model.dtype, "images"), lambda: difference_in_rows(runner, prompt_ids, inputs))


def _reason(model: nn.Module, key: Any, difference: Callable[[], float]) -> str | None:
    """What was found for a model, or is found now."""
    found = _found.setdefault(model, {})
    if key not in found:
        dtype = key if isinstance(key, torch.dtype) else key[0]
        try:
            apart = difference()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a family does that works otherwise
            found[key] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        else:
            # NaN is no reason: it is told where tokens are sampled.
            wrong = apart > _LARGEST_DIFFERENCE.get(dtype, _LARGEST_DIFFERENCE_OF_HALF)
            found[key] = f"what follows a token differs by {apart:.2g}" if wrong else None
    return found[key]


@torch.inference_mode()
def difference_in_rows(runner: ModelRunner, prompt_ids: Sequence[int], inputs: dict[str, Any]) -> float:
    """Compare the token that follows a prompt by way of a row with the model's own forward.

    Args:
        runner: of the generator.
        prompt_ids: at least two tokens.
        inputs: for `ModelRunner.prefill_inputs`; empty for text.

    Returns:
        Total variation of the two distributions, 0 to 1; NaN where the model's logits are.
    """
    ids = torch.tensor([list(prompt_ids)], device=runner.model.device)
    output, prefill, offsets = runner.prefill_inputs(inputs or {"input_ids": ids})
    if not inputs:
        prefill, offsets = runner.prefill([list(prompt_ids)[:-1]]), [0]
    cache = runner.new_cache()
    cache.fill([0], prefill, [0], len(prompt_ids) - 1, offsets[0])
    logits = runner.forward(cache, ids[:, -1:].expand(FEWEST_ROWS, 1)).logits[0, -1]
    own, in_row = output.logits[0, -1].double().softmax(-1), logits.double().softmax(-1)
    return float((own - in_row).abs().sum() / 2)


@torch.inference_mode()
def _difference_of_values(lenvm: LengthValueModel) -> float:
    """Largest one between values of candidates in a tree and those of whole sequences."""
    scorer = CandidateScorer(lenvm)
    device = lenvm.backbone.device
    prompt, candidates = torch.tensor([_PROMPT], device=device), torch.tensor([_CANDIDATES], device=device)
    scorer.cache.fill([0], scorer.runner.prefill([_PROMPT[:-1]]), [0], len(_PROMPT) - 1)
    after, before = scorer.score(prompt[:, -1:], candidates, torch.zeros_like(candidates, dtype=torch.bool))
    whole = torch.cat([prompt.expand(len(_CANDIDATES), -1), candidates.T], 1)
    expected = lenvm.remaining(lenvm(whole))[:, -2:]
    ours = torch.stack([before.expand(len(_CANDIDATES)), after[0]], 1)
    return float((lenvm.gamma ** ours.double() - lenvm.gamma ** expected.double()).abs().max())
