"""Whether a model says in rows of a `KVCache` what it says on its own: checked once for each model.

Most families do, to the last bit. Those that take positions from where keys lie (ALiBi), or have masks of their own,
would be silently wrong.
"""

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import GenerationError, named
from ..models.value_model import LengthValueModel
from .candidate_scorer import CandidateScorer
from .kv_cache import FEWEST_ROWS
from .model_runner import ModelRunner, Prefill

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

    def build() -> ModelRunner:
        return ModelRunner(generator, compiled)

    return _opened("generator", generator, generator.dtype, build, lambda: _difference_of_tokens(generator))


def open_scorer(lenvm: LengthValueModel, fewest_rows: int = 1, compiled: bool = False) -> CandidateScorer:
    """A length value model, ready to score candidates in rows.

    Args:
        lenvm: in eval mode.
        fewest_rows: see `CandidateScorer`.
        compiled: see `open_runner`.

    Raises:
        GenerationError: it does not work so.
    """

    def build() -> CandidateScorer:
        return CandidateScorer(lenvm, fewest_rows, compiled)

    dtype = next(lenvm.parameters()).dtype
    return _opened("lenvm", lenvm, dtype, build, lambda: _difference_of_values(lenvm))


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
        reason = named(error)
    if reason:
        name = type(model.backbone if isinstance(model, LengthValueModel) else model).__name__
        raise GenerationError(f"{who}: {name} cannot be decoded in rows of a cache: {reason}")
    return opened


def require_same_after_images(
    runner: ModelRunner,
    lenvm: LengthValueModel | None,
    output: Any,
    prefills: Sequence[Prefill],
    prompts: Sequence[Sequence[int]],
) -> None:
    """Refuse a model that, after prompts with images, says in rows something else than it just said on its own.

    Args:
        runner: of the generator, or of a length value model's backbone.
        lenvm: the length value model; None for a generator.
        output: of the model for a batch of prompts whose last column holds the last token of each of ``prompts``.
        prefills: where those prompts are in the cache that came with it.
        prompts: token ids of each.

    Raises:
        GenerationError: it does not work so.
    """
    model = runner.model
    reason = _reason(
        model, (model.dtype, "images"), lambda: _difference_after_images(runner, lenvm, output, prefills, prompts)
    )
    if reason:
        who = "generator" if lenvm is None else "lenvm"
        raise GenerationError(f"{who}: {type(model).__name__} cannot be decoded in rows after images: {reason}")


@torch.inference_mode()
def _difference_after_images(
    runner: ModelRunner,
    lenvm: LengthValueModel | None,
    output: Any,
    prefills: Sequence[Prefill],
    prompts: Sequence[Sequence[int]],
) -> float:
    """Largest difference over some prompts: of values, or total variation of next-token distributions."""

    def said(out: Any, rows: Sequence[int]) -> Tensor:
        if lenvm is None:
            return out.logits[list(rows), -1].double().softmax(-1) / 2
        return lenvm.gamma ** lenvm.remaining(lenvm.v_head(out.last_hidden_state[list(rows), -1])).double()[:, None]

    plain = ModelRunner(runner.model)  # to compile for this would take longer than the steps themselves
    cache = plain.new_cache()
    for row, (one, ids) in enumerate(zip(prefills, prompts, strict=True)):
        cache.fill([row], one.cache, [one.row], len(ids) - 1, offset=one.offset, start=one.start)
    last_tokens = torch.zeros(cache.rows, 1, dtype=torch.int64, device=runner.model.device)
    last_tokens[: len(prompts), 0] = torch.tensor([ids[-1] for ids in prompts])
    in_rows = said(plain.forward(cache, last_tokens), range(len(prompts)))
    return float((said(output, [one.row for one in prefills]) - in_rows).abs().sum(-1).max())


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
            found[key] = named(error)
        else:
            # NaN is no reason: it is told where tokens are sampled.
            wrong = apart > _LARGEST_DIFFERENCE.get(dtype, _LARGEST_DIFFERENCE_OF_HALF)
            found[key] = f"what follows a token differs by {apart:.2g}" if wrong else None
    return found[key]


@torch.inference_mode()
def _difference_of_tokens(generator: PreTrainedModel) -> float:
    """Total variation, 0 to 1, of the next-token distributions in a row and of the model's own forward.

    NaN where the model's logits are.
    """
    runner = ModelRunner(generator)
    prompt = torch.tensor([_PROMPT], device=generator.device)
    cache = runner.new_cache()
    cache.fill([0], runner.prefill([_PROMPT[:-1]]), [0], len(_PROMPT) - 1)
    in_row = runner.forward(cache, prompt[:, -1:].expand(FEWEST_ROWS, 1)).logits[0, -1]
    own = runner.prefill_inputs({"input_ids": prompt})[0].logits[0, -1]
    return float((own.double().softmax(-1) - in_row.double().softmax(-1)).abs().sum() / 2)


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
