"""The arguments of one call of ``generate``: checked, all problems told at once, and made into jobs."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Never

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .continuous import ContinuousBatch, Job, Prefix, Row
from .decoding import SlotDecoder
from .drawing import Drawing, completion_seed
from .errors import GenerationError
from .guidance import AtMost, Control, target_of
from .guide import Guide
from .value_model import LengthValueModel

MAX_TOKENS = 512  # of a completion without a target
_MOST_ROWS = 256
_SPARE_IDS = 1024  # by so many rows may the embeddings of one vocabulary differ: they are padded to round numbers


class Call:
    """The arguments of one call: checked, and made into jobs.

    Attributes:
        n: completions of a prompt.
        gamma: of the length value model; 0 without one.
        failed: prompts that cannot be answered, and why.
    """

    def __init__(
        self,
        generator: PreTrainedModel,
        lenvm: LengthValueModel | None,
        inputs: Any,
        *,
        control: Control | Sequence[Control | None] | None = None,
        n: int = 1,
        max_tokens: int | Sequence[int | None] | None = None,
        temperature: float | Sequence[float] = 1.0,
        top_k: int | Sequence[int] = 15,
        top_p: float | Sequence[float] = 0.999,
        min_p: float | Sequence[float] = 0.0,
        seed: int | Sequence[int] = 0,
        stop: str | Sequence[str] = (),
        tokenizer: Any = None,
        ends: Callable[[int, list[int]], bool] | None = None,
    ) -> None:
        self.n = n
        self.gamma = lenvm.gamma if lenvm else 0.0
        self._generator = generator
        self._lenvm = lenvm
        self._problems: list[str] = []
        self._prompts, self._vision = _read_inputs(inputs)
        count = len(self._prompts)
        if n < 1:
            self._problems.append(f"n must be at least 1 completion, got {n}")
        controls = self._per_prompt("control", control)
        numbers = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        columns = {name: self._per_prompt(name, value) for name, value in numbers.items()}
        drawings = [self._drawing({name: column[row] for name, column in columns.items()}) for row in range(count)]
        limits = self._per_prompt("max_tokens", max_tokens)
        seeds = self._per_prompt("seed", seed if isinstance(seed, Sequence) else [seed + row for row in range(count)])
        self._check_models(controls)
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if stops and tokenizer is None:
            self._problems.append("stop needs tokenizer: without it nobody can read what was written")
        self.failed: list[tuple[int, str]] = []
        self._jobs = []
        for row, ids in enumerate(self._prompts):
            tokens, problem = self._limit(len(ids), controls[row], limits[row])
            if problem:
                self.failed.append((row, problem))
                continue
            ending = _ending(row, stops, tokenizer, ends)
            own = [completion_seed(seeds[row], "", index) for index in range(max(n, 1))]
            self._jobs.append(Job(row, ids, own, tokens, drawings[row], controls[row], ends=ending))
        if not self._jobs:
            reasons = dict.fromkeys(reason for _, reason in self.failed)
            self._problems += [f"no prompt can be answered: {'; '.join(reasons) or 'inputs holds none'}"]
        if self._problems:
            raise GenerationError("; ".join(dict.fromkeys(self._problems)))

    def _per_prompt(self, name: str, value: Any) -> list[Any]:
        count = len(self._prompts)
        if not isinstance(value, Sequence) or isinstance(value, str):
            return [value] * count
        if len(value) != count:
            self._problems.append(f"{name} has {len(value)} entries for {count} prompts: give one, or one for each")
            return [next(iter(value), None)] * count
        return list(value)

    def _drawing(self, settings: dict[str, Any]) -> Drawing:
        try:
            return Drawing(**settings)
        except (TypeError, ValueError) as error:
            self._problems.append(str(error))
            return Drawing()

    def _check_models(self, controls: Sequence[Control | None]) -> None:
        models = {"generator": self._generator, **({"lenvm": self._lenvm.backbone} if self._lenvm else {})}
        for who, model in models.items():
            if any(name.startswith("pixel_values") for name in self._vision) and not _sees(model):
                self._problems.append(f"inputs has pictures, but {who} ({type(model).__name__}) reads text only")
        if self._lenvm is None:
            if any(control is not None for control in controls):
                self._problems.append("control needs lenvm, a length value model; got None")
            return
        for row, control in enumerate(controls):
            if control is not None and not callable(control):
                self._problems.append(f"control {control!r} of prompt {row} is none: use EqualTo(128), Tilt(-5), …")
        sizes = [vocabulary(model) for model in models.values()]
        if abs(sizes[0] - sizes[1]) >= _SPARE_IDS:
            self._problems.append(
                f"generator and lenvm have different vocabularies ({sizes[0]:,} and {sizes[1]:,} tokens): a length "
                "value model serves generators that share its tokenizer"
            )

    def _limit(self, prompt: int, control: Control | None, asked: int | None) -> tuple[int, str | None]:
        """Tokens that a completion may have, and why there can be none."""
        if not prompt:
            return 0, "inputs: the prompt is empty"
        window = getattr(self._generator.config.get_text_config(), "max_position_embeddings", None) or math.inf
        target = target_of(control)
        if asked is not None and asked < 1:
            self._problems.append(f"max_tokens must be at least 1, got {asked}")
        elif asked is not None and target is not None and asked < target and not isinstance(control, AtMost):
            self._problems.append(f"control {control} and max_tokens={asked} contradict each other: raise max_tokens")
        if target is not None and prompt + target > window:
            return 0, (
                f"control {control}: a prompt of {prompt} tokens and a target of {target} pass the context window of "
                f"{window} tokens"
            )
        if asked is not None and prompt + asked > window:
            return 0, f"max_tokens={asked}: with a prompt of {prompt} tokens it passes the context window of {window}"
        default = MAX_TOKENS if target is None else 2 * target + 16
        tokens = int(min(asked or default, window - prompt))
        return tokens, None if tokens > 0 else f"inputs: the prompt of {prompt} tokens fills the context window"

    def steps(self) -> Iterator[list[Row]]:
        """Prefill what has pictures, then write; yields after each step the rows that it has written a token of."""
        decoder = SlotDecoder(self._generator)
        guide = Guide(self._lenvm) if self._lenvm else None
        if self._vision:
            self._prefill(decoder, guide)
        spare = range(vocabulary(self._lenvm.backbone) if self._lenvm else 2**31, vocabulary(self._generator))
        images = {getattr(self._generator.config, name, None) for name in ("image_token_id", "video_token_id")}
        never = sorted({*spare, *(token for token in images if token is not None)})
        forbidden = torch.tensor(never, device=self._generator.device) if never else None
        rows = min(_MOST_ROWS, len(self._jobs) * self.n)
        batch = ContinuousBatch[Never](decoder, rows, stop_ids(self._generator), forbidden, guide)
        return batch.steps(self._jobs)

    @torch.inference_mode()
    def _prefill(self, decoder: SlotDecoder, guide: Guide | None) -> None:
        """Run all prompts, pictures included, through both models at once, as the processor has laid them out."""
        inputs = self._vision
        mask = inputs["attention_mask"]
        caches = []
        moved = [_moved(inputs, self._generator)] + ([guide.moved(inputs)] if guide else [])
        try:
            for own, part in zip([decoder] + ([guide.decoder] if guide else []), moved, strict=True):
                caches.append(own.prefill_inputs(part)[1:])
        except (ValueError, TypeError, IndexError) as error:
            raise GenerationError(f"inputs: the models cannot take these pictures: {error}") from error
        starts = mask.long().argmax(-1).tolist()
        for job in self._jobs:
            job.prefixes = tuple(Prefix(cache, job.key, starts[job.key], offsets[job.key]) for cache, offsets in caches)


def vocabulary(model: Any) -> int:
    """Rows of the input embedding: tokens, and often a few spare ones."""
    return int(model.get_input_embeddings().weight.shape[0])


def stop_ids(generator: PreTrainedModel) -> frozenset[int]:
    """Ids that end a completion, from the first place that names any."""
    for config in (generator.generation_config, generator.config, generator.config.get_text_config()):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return frozenset(ids if isinstance(ids, list | tuple) else [int(ids)])
    return frozenset()


def _read_inputs(inputs: Any) -> tuple[list[list[int]], dict[str, Tensor]]:
    """Token ids of each prompt without padding; and everything the models take, where that is more than text."""
    if isinstance(inputs, Mapping) or hasattr(inputs, "keys"):
        given = {name: inputs[name] for name in inputs.keys() if isinstance(inputs[name], Tensor)}  # noqa: SIM118
        if "input_ids" not in given:
            raise GenerationError(f"inputs must hold input_ids as a tensor; it has {', '.join(inputs.keys())}")
    elif isinstance(inputs, Tensor):
        given = {"input_ids": inputs}
    else:
        return [list(ids) for ids in inputs], {}
    ids = given["input_ids"]
    if ids.ndim != 2:
        raise GenerationError(f"inputs: input_ids must have the shape (prompts, tokens), got {tuple(ids.shape)}")
    given.setdefault("attention_mask", torch.ones_like(ids))
    mask = given["attention_mask"].bool()
    return [row[seen].tolist() for row, seen in zip(ids, mask, strict=True)], given if len(given) > 2 else {}


def _moved(inputs: dict[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }


def _sees(model: PreTrainedModel) -> bool:
    return model.config.get_text_config() is not model.config


def _ending(
    row: int, stops: tuple[str, ...], tokenizer: Any, ends: Callable[[int, list[int]], bool] | None
) -> Callable[[list[int]], bool] | None:
    """Whether what was written of a prompt is to end."""
    if not stops and ends is None:
        return None
    tail = max([len(text.encode()) for text in stops], default=0)

    def ending(ids: list[int]) -> bool:
        # A token is a byte at least, but for the first ones, which may be parts of a character.
        if stops and any(text in tokenizer.decode(ids[-tail - 8 :]) for text in stops):
            return True
        return ends is not None and ends(row, ids)

    return ending
