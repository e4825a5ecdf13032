"""The arguments of one call of ``generate``: checked, all problems told at once, and made into jobs."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from numbers import Integral
from operator import index as as_whole
from typing import Any, Never

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import GenerationError
from ..guidance import AtMost, Control, innermost, is_control, target_of
from ..models.value_model import LengthValueModel
from .batched_controls import numbers_for_a_batch
from .candidate_scorer import Guide
from .compatibility import open_generator, open_lenvm
from .compiled import missing_for_compile
from .engine import ContinuousBatch, Job, Prefix, Row
from .model_runner import SlotDecoder
from .sampling_params import SamplingParams, completion_seed

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
        eos_token_id: int | Sequence[int] | None = None,
        tokenizer: Any = None,
        ends: Callable[[int, list[int]], bool] | None = None,
        compile: bool = False,
    ) -> None:
        if lenvm is not None and not isinstance(lenvm, LengthValueModel):
            raise GenerationError(
                f"lenvm must be a length value model, got {lenvm if isinstance(lenvm, str) else type(lenvm).__name__}: "
                "load one with LengthValueModel.from_pretrained(…)"
            )
        self.n = n
        self.gamma = lenvm.gamma if lenvm else 0.0
        self._generator = generator
        self._lenvm = lenvm
        self._problems: list[str] = []
        self._prompts, self._vision = _read_inputs(inputs)
        self._models: dict[str, Any] = {"generator": generator, **({"lenvm": lenvm.backbone} if lenvm else {})}
        self._known = min(map(vocabulary, self._models.values()))
        images = (getattr(generator.config, name, None) for name in ("image_token_id", "video_token_id"))
        self._images = {token for token in images if token is not None}
        count = len(self._prompts)
        self._require_whole("n", n, "at least 1 completion")
        controls = self._per_prompt("control", control)
        numbers = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        columns = {name: self._per_prompt(name, value) for name, value in numbers.items()}
        drawings = [self._drawing({name: column[row] for name, column in columns.items()}) for row in range(count)]
        limits = self._per_prompt("max_tokens", max_tokens)
        one = isinstance(seed, Integral)
        seeds = self._per_prompt("seed", [seed + row for row in range(count)] if one else seed)  # type: ignore[operator]
        self._check_models()
        self._compile = compile
        missing = missing_for_compile(generator.device) if compile else None
        self._problems += [missing] if missing else []
        self._check_controls(controls)
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if stops and tokenizer is None:
            self._problems.append("stop needs tokenizer: without it nobody can read what was written")
        if "" in stops:
            self._problems.append("stop has an empty string, which is everywhere")
        self._ends = self._end_ids(eos_token_id)
        self.failed: list[tuple[int, str]] = []
        self._jobs: list[Job] = []
        for row, columns_of_row in enumerate(zip(drawings, controls, limits, seeds, strict=True)):
            self._add_job(row, *columns_of_row, _ending(row, stops, tokenizer, ends))
        if not self._jobs:
            reasons = dict.fromkeys(reason for _, reason in self.failed)
            self._problems += [f"no prompt can be answered: {'; '.join(reasons) or 'inputs holds none'}"]
        if self._problems:
            raise GenerationError("; ".join(dict.fromkeys(self._problems)))

    def _add_job(
        self, row: int, drawing: SamplingParams, control: Control | None, limit: int | None, seed: Any, ending: Any
    ) -> None:
        self._require_whole("seed", seed, "a number", least=None)
        ids = self._prompts[row]
        tokens, problem = self._limit(len(ids), control, limit)
        problem = self._unreadable(ids) or problem
        if problem:
            self.failed.append((row, problem))
        else:
            seeds = [] if self._problems else [completion_seed(seed, "", index) for index in range(self.n)]
            self._jobs.append(Job(row, ids, seeds, tokens, drawing, control, ends=ending))

    def _require_whole(self, name: str, number: Any, what: str, least: int | None = 1) -> None:
        if isinstance(number, bool) or not isinstance(number, Integral) or (least is not None and number < least):
            self._problems.append(f"{name} must be {what}, whole; got {number!r}")

    def _per_prompt(self, name: str, value: Any) -> list[Any]:
        count = len(self._prompts)
        if hasattr(value, "tolist"):  # tensors, arrays and their numbers
            value = value.tolist()
        if not isinstance(value, Sequence) or isinstance(value, str):
            return [value] * count
        if len(value) != count:
            self._problems.append(f"{name} has {len(value)} entries for {count} prompts: give one, or one for each")
            return [next(iter(value), None)] * count
        return list(value)

    def _end_ids(self, given: int | Sequence[int] | None) -> frozenset[int]:
        if given is None:
            return stop_ids(self._generator)
        ids = given if isinstance(given, Sequence) else [given]
        for token in ids:
            self._require_whole("eos_token_id", token, "a token's id", least=0)
        return frozenset(ids)

    def _drawing(self, settings: dict[str, Any]) -> SamplingParams:
        try:
            return SamplingParams(**settings)
        except ValueError as error:
            self._problems.append(str(error))
        except TypeError:
            told = ", ".join(f"{name}={value!r}" for name, value in settings.items())
            self._problems.append(f"settings of drawing must be numbers, or one number for each prompt; got {told}")
        return SamplingParams()

    def _check_models(self) -> None:
        for who, model in self._models.items():
            if any(name.startswith("pixel_values") for name in self._vision) and not sees(model):
                self._problems.append(f"inputs has pictures, but {who} ({type(model).__name__}) reads text only")
        sizes = [vocabulary(model) for model in self._models.values()]
        if abs(sizes[0] - sizes[-1]) >= _SPARE_IDS:
            self._problems.append(
                f"generator and lenvm have different vocabularies ({sizes[0]:,} and {sizes[1]:,} tokens): a length "
                "value model serves generators that share its tokenizer"
            )

    def _check_controls(self, controls: Sequence[Control | None]) -> None:
        wished = {row: control for row, control in enumerate(controls) if control is not None}
        if wished and self._lenvm is None:
            self._problems.append("control needs lenvm, a length value model; got None")
        for row, control in wished.items():
            if not is_control(control):
                self._problems.append(f"control {control!r} of prompt {row} is none: use EqualTo(128), Tilt(-5), …")
            elif numbers_for_a_batch(control):
                self._problems.append("control has numbers for several rows: give a list, one control for each prompt")

    def _unreadable(self, ids: list[int]) -> str | None:
        """Why a prompt's ids cannot be read."""
        strange = next((token for token in ids if not 0 <= token < self._known), None)
        if strange is not None:
            return f"inputs: the models know no token {strange}, only {self._known:,} tokens"
        if not self._images.isdisjoint(ids) and not any(name.startswith("pixel_values") for name in self._vision):
            return "inputs: a picture's token stands in the prompt, but there are no pictures (pixel_values)"
        return None

    def _limit(self, prompt: int, control: Control | None, asked: int | None) -> tuple[int, str | None]:
        """Tokens that a completion may have, and why there can be none."""
        if not prompt:
            return 0, "inputs: the prompt is empty"
        texts = [model.config.get_text_config() for model in self._models.values()]
        window = min(getattr(text, "max_position_embeddings", None) or math.inf for text in texts)
        target = target_of(control)
        if asked is not None:
            self._require_whole("max_tokens", asked, "at least 1")
            if self._problems:
                return 0, None
        if asked is not None and target is not None and asked < target and not isinstance(innermost(control), AtMost):
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

    def steps(self, most: int = _MOST_ROWS) -> Iterator[list[Row]]:
        """Prefill what has pictures, then write; yields after each step the rows that it has written a token of.

        Args:
            most: completions written side by side.
        """
        decoder = open_generator(self._generator, self._compile)
        guide = open_lenvm(self._lenvm, compiled=self._compile) if self._lenvm else None
        if self._vision:
            self._prefill(decoder, guide)
        spare = range(vocabulary(self._lenvm.backbone) if self._lenvm else 2**31, vocabulary(self._generator))
        never = sorted({*spare, *self._images})
        forbidden = torch.tensor(never, device=self._generator.device) if never else None
        rows = min(most, len(self._jobs) * self.n)
        batch = ContinuousBatch[Never](decoder, rows, self._ends, forbidden, guide)
        return batch.steps(self._jobs)

    @torch.inference_mode()
    def _prefill(self, decoder: SlotDecoder, guide: Guide | None) -> None:
        """Run all prompts, pictures included, through both models at once, as the processor has laid them out."""
        inputs = dict(self._vision)
        inputs["input_ids"] = inputs["input_ids"].clamp(0, self._known - 1)  # prompts that have failed stay beside the
        inputs["attention_mask"] = mask = inputs["attention_mask"].clone()  # others, and must not spoil them
        mask[~mask.bool().any(-1), -1] = 1
        caches = []
        moved = [_moved(inputs, self._generator)] + ([guide.moved(inputs)] if guide else [])
        try:
            for own, part in zip([decoder] + ([guide.decoder] if guide else []), moved, strict=True):
                caches.append(own.prefill_inputs(part)[1:])
        except torch.OutOfMemoryError:
            raise
        except (ValueError, TypeError, IndexError, AttributeError, RuntimeError) as error:
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
    given: dict[str, Any] = {"input_ids": inputs}
    if hasattr(inputs, "keys"):
        given = {name: inputs[name] for name in inputs.keys()}  # noqa: SIM118
    if not isinstance(given.get("input_ids"), Tensor):
        return _read_lists(given), {}
    given = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    ids = given["input_ids"]
    given.setdefault("attention_mask", torch.ones_like(ids))
    mask = given["attention_mask"].bool()
    if ids.ndim != 2 or mask.shape != ids.shape:
        raise GenerationError(
            "inputs: input_ids and attention_mask must have the shape (prompts, tokens), got "
            f"{tuple(ids.shape)} and {tuple(mask.shape)}"
        )
    return [row[seen].tolist() for row, seen in zip(ids, mask, strict=True)], given if len(given) > 2 else {}


def _read_lists(given: dict[str, Any]) -> list[list[int]]:
    """Token ids of each prompt, from lists of them."""
    rows: Iterable[Any] | None = given.get("input_ids")
    pictures = any(name.startswith("pixel_values") for name in given)
    try:
        assert rows is not None
        assert not pictures
        lists = [[as_whole(token) for token in row] for row in rows]
        masks = given.get("attention_mask", lists)
        if masks is not lists:
            lists = [[t for t, seen in zip(*pair, strict=True) if seen] for pair in zip(lists, masks, strict=True)]
    except (TypeError, ValueError, AssertionError) as error:
        raise GenerationError(
            "inputs must be what a processor returns with return_tensors='pt', or a list of token ids for each prompt; "
            f"got {', '.join(given) if rows is None or pictures else repr(rows)[:60]}"
        ) from error
    return lists


def _moved(inputs: dict[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }


def sees(model: PreTrainedModel) -> bool:
    """Whether a model takes pictures."""
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
