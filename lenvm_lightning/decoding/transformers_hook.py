"""Guided decoding through transformers' own ``generate``: its hook for decoding methods, ``custom_generate``."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinPLogitsWarper,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation import GenerateDecoderOnlyOutput

from ..errors import GenerationError
from ..guidance import Control
from ..models.value_model import LengthValueModel
from .generate import Completion, Token, generate, stream

_WARPERS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)
_REPEATED = ("attention_mask", "mm_token_type_ids")  # inputs of one row a sequence


def guided(
    lenvm: LengthValueModel,
    control: Control | Sequence[Control | None] | None,
    streamer: Any = None,
    tokenizer: Any = None,
) -> Callable[..., Tensor | GenerateDecoderOnlyOutput] | None:
    """A decoding method for ``generator.generate(**inputs, custom_generate=guided(lenvm, EqualTo(128)))``.

    Sampling settings, token limits, end tokens and stopping criteria are those given to ``generate``; seeds come from
    torch's. A sequence that fails is warned of, and holds what was written until then.
    Without a control this is None, and ``generate`` samples as it always does. (transformers 5.24 loses the tokenizer
    of ``stop_strings`` and the streamer on the way to any custom method: give
    ``stopping_criteria=[StopStringCriteria(…)]``, and the streamer to both, ``generate`` and this.)

    Args:
        lenvm: length value model of the same vocabulary.
        control: of the length; a list has one entry for each prompt.
        streamer: of transformers, that gets the tokens as they are written; for one sequence.
        tokenizer: of the generator; needed where a control counts to a text.

    Raises:
        GenerationError: when called, with what `generate` refuses, beams, or logits processors that
            do more than truncate.
    """
    if control is None:
        return None

    def decode(
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        # Named so that `generate` hands them over, instead of encoding the images for its own model only.
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        image_sizes: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        **model_kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        settings = generation_config
        _check(logits_processor, settings, streamer, len(input_ids) // (settings.num_return_sequences or 1))
        n = settings.num_return_sequences or 1  # by which everything but the images is repeated
        images = {
            "pixel_values": pixel_values,
            "image_grid_thw": image_grid_thw,
            "pixel_attention_mask": pixel_attention_mask,
            "image_sizes": image_sizes,
            "pixel_values_videos": pixel_values_videos,
            "video_grid_thw": video_grid_thw,
        }
        others = [one for one in stopping_criteria if not isinstance(one, MaxLengthCriteria | EosTokenCriteria)]
        prompts = input_ids[::n]
        repeated = {name: model_kwargs[name] for name in _REPEATED if model_kwargs.get(name) is not None}
        inputs = {
            "input_ids": prompts,
            **{name: value[::n] for name, value in repeated.items()},
            **{name: value for name, value in images.items() if value is not None},
        }
        asked: dict[str, Any] = dict(
            control=control,
            n=n,
            max_tokens=settings.max_length - input_ids.shape[1],
            temperature=(1.0 if settings.temperature is None else settings.temperature) if settings.do_sample else 0.0,
            top_k=settings.top_k or 0,
            top_p=1.0 if settings.top_p is None else settings.top_p,
            min_p=settings.min_p or 0.0,
            seed=torch.randint(2**31, (len(prompts),)).tolist(),
            eos_token_id=settings.eos_token_id,
            ends=_as_ending(others, prompts) if others else None,
            tokenizer=tokenizer,
        )
        if streamer is None:
            completions = generate(model, lenvm, inputs, **asked)
        else:
            completions = [_streamed(stream(model, lenvm, inputs, **asked), streamer)]
        return _as_sequences(completions, input_ids, settings)

    return decode


def _streamed(tokens: Iterable[Token], streamer: Any) -> Completion:
    """Hand the tokens of one completion to a streamer of transformers, which has the prompt already."""
    written: list[int] = []
    for token in tokens:
        if token.finish_reason == "error":
            streamer.end()
            return Completion(0, 0, written, "error", error="the prompt cannot be read, or numbers are NaN or infinite")
        written.append(token.token_id)
        streamer.put(torch.tensor([token.token_id]))
    streamer.end()
    return Completion(0, 0, written)


def _as_sequences(
    completions: Sequence[Completion], input_ids: Tensor, settings: GenerationConfig
) -> Tensor | GenerateDecoderOnlyOutput:
    """Completions the way ``generate`` returns them: behind their prompts, padded on the right."""
    for row, completion in enumerate(completions):
        if completion.error:
            warnings.warn(f"sequence {row}: {completion.error}", stacklevel=4)
    written = [torch.tensor(completion.token_ids, dtype=torch.int64) for completion in completions]
    pad = 0 if settings.pad_token_id is None else int(settings.pad_token_id)
    tail = torch.nn.utils.rnn.pad_sequence(written, batch_first=True, padding_value=pad)
    sequences = torch.cat([input_ids, tail.to(input_ids.device)], dim=1)
    if not settings.return_dict_in_generate:
        return sequences
    return GenerateDecoderOnlyOutput(sequences=sequences)  # type: ignore[arg-type]


def _check(processors: LogitsProcessorList, config: GenerationConfig, streamer: Any, prompts: int) -> None:
    problems = [
        f"{type(processor).__name__} changes what a control would choose among: leave out the setting that asks for it"
        for processor in processors
        if not isinstance(processor, _WARPERS)
    ]
    if (config.num_beams or 1) > 1:
        problems.append(f"num_beams={config.num_beams}: guided decoding samples, one beam")
    if config.output_scores or config.output_logits or config.output_attentions or config.output_hidden_states:
        problems.append("output_scores, output_logits, …: guided decoding keeps none; generate(trace=True) tells more")
    if streamer is not None and prompts * (config.num_return_sequences or 1) > 1:
        problems.append("streamer: it takes one sequence; lenvm_lightning.stream takes many")
    if problems:
        raise GenerationError("; ".join(problems))


def _as_ending(criteria: Sequence[Any], prompts: Tensor) -> Callable[[int, list[int]], bool]:
    def ends(row: int, ids: list[int]) -> bool:
        written = torch.tensor([ids], dtype=prompts.dtype, device=prompts.device)
        sequence = torch.cat([prompts[row : row + 1], written], dim=1)
        return any(bool(torch.as_tensor(one(sequence, None)).all()) for one in criteria)

    return ends
