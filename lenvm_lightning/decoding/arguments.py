"""The arguments of one call of `generate`: checked, all problems told at once, and made into requests."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import index as as_whole
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import GenerationError
from ..guidance import Control, is_control, target_of, until_of
from ..models.processors import tokenizer_of
from ..models.value_model import LengthValueModel
from ..utils.settings import is_integer
from .batched_controls import numbers_for_a_batch
from .compiled import missing_for_compile
from .engine import Engine
from .limits import context_window, contradiction, why_no_room, why_unreadable
from .prefill import Request
from .running_completion import RunningCompletion
from .sampling_params import GUIDED_SAMPLING, SamplingParams, completion_seed
from .segments import why_not_until
from .text_stream import ends_with_stop
from .vocabulary import SPARE_IDS, embedding_rows, stop_ids_of

MAX_TOKENS = 512  # of a completion without a target
_ROOM_FACTOR, _ROOM = 2, 16  # beside a target: one that is missed is better seen missed than truncated
_MAX_ROWS = 256  # completions written side by side, where nobody says: more take memory and were never measured


def room_for(target: int | None, until: str | None) -> int:
    """Tokens that a completion may have where nobody says.

    Args:
        target: of its control, or of its segment; None without one.
        until: what ends the segment, behind which an answer follows; None where the target is of the whole.
    """
    if target is None or until is not None:
        return MAX_TOKENS + (target or 0)
    return _ROOM_FACTOR * target + _ROOM


@dataclass
class Arguments:
    """What `generate` and `stream` take; see there."""

    generator: PreTrainedModel
    lenvm: LengthValueModel | None
    inputs: Any
    control: Control | Sequence[Control | None] | None = None
    n: int = 1
    max_tokens: int | Sequence[int | None] | None = None
    temperature: float | Sequence[float] = GUIDED_SAMPLING.temperature
    top_k: int | Sequence[int] = GUIDED_SAMPLING.top_k
    top_p: float | Sequence[float] = GUIDED_SAMPLING.top_p
    min_p: float | Sequence[float] = GUIDED_SAMPLING.min_p
    seed: int | Sequence[int] = 0
    stop: str | Sequence[str] = ()
    eos_token_id: int | Sequence[int] | None = None
    tokenizer: Any = None
    ends: Callable[[int, list[int]], bool] | None = None
    compile: bool = False


class RequestBatch:
    """The requests of one call of `generate`, made of its arguments when all of them are right.

    Attributes:
        n: completions of a prompt.
        gamma: of the length value model; 0 without one.
        failed: prompts that cannot be answered, and why.

    Raises:
        GenerationError: arguments that mean nothing or contradict each other, all of them named.
    """

    def __init__(self, given: Arguments) -> None:
        lenvm = given.lenvm
        if lenvm is not None and not isinstance(lenvm, LengthValueModel):
            raise GenerationError(
                f"lenvm must be a length value model, got {lenvm if isinstance(lenvm, str) else type(lenvm).__name__}: "
                "load one with LengthValueModel.from_pretrained(…)"
            )
        self.n = given.n
        self.gamma = lenvm.gamma if lenvm else 0.0
        self.failed: list[tuple[int, str]] = []
        self._given = given
        self._prompts, self._vision = _read_inputs(given.inputs)
        self._models: dict[str, Any] = {"generator": given.generator}
        if lenvm is not None:
            self._models["lenvm"] = lenvm.backbone
        self._known_tokens = min(embedding_rows(model) for model in self._models.values())  # by all of them
        self._problems: list[str] = []
        self._check_models()
        self._check_whole("n", given.n, "at least 1 completion")
        stops = self._stops()
        self._stop_ids = self._end_ids()
        self._requests: list[Request] = []
        controls, params = self._controls(), self._params(stops)
        for row in range(len(self._prompts)):
            self._add_request(row, controls[row], *params[row])
        if not self._requests:  # all have failed
            reasons = dict.fromkeys(reason for _, reason in self.failed)
            self._problems.append(f"no prompt can be answered: {'; '.join(reasons) or 'inputs holds none'}")
        if self._problems:
            raise GenerationError("; ".join(dict.fromkeys(self._problems)))

    def steps(self, max_rows: int = _MAX_ROWS) -> Iterator[list[RunningCompletion]]:
        """Prefill what has images, then write; yields after each step the completions it has written a token of.

        Args:
            max_rows: completions written side by side.
        """
        given = self._given
        engine = Engine[Any](
            given.generator,
            given.lenvm,
            processor=given.tokenizer,
            stop_ids=self._stop_ids,
            max_rows=min(max_rows, len(self._requests) * self.n),
            compiled=given.compile,
        )
        if self._vision:
            self._prefill_images(engine)
        return engine.steps(self._requests)

    def _prefill_images(self, engine: Engine[Any]) -> None:
        """Let the engine read all prompts, images included, as the processor has laid them out."""
        inputs = dict(self._vision)
        # Prompts that have failed stay beside the others, and must not spoil them.
        inputs["input_ids"] = inputs["input_ids"].clamp(0, self._known_tokens - 1)
        inputs["attention_mask"] = mask = inputs["attention_mask"].clone()
        mask[~mask.bool().any(-1), -1] = 1
        try:
            engine.prefill_batch(inputs, self._requests, [request.key for request in self._requests])
        except (torch.OutOfMemoryError, GenerationError):
            raise
        except (ValueError, TypeError, IndexError, AttributeError, RuntimeError) as error:
            raise GenerationError(f"inputs: the models cannot take these images: {error}") from error

    # -- checks ---

    def _check_models(self) -> None:
        given = self._given
        for who, model in self._models.items():
            if _has_images(self._vision) and not reads_images(model):
                self._problems.append(f"inputs has images, but {who} ({type(model).__name__}) reads text only")
        sizes = [embedding_rows(model) for model in self._models.values()]
        if abs(sizes[0] - sizes[-1]) >= SPARE_IDS:
            self._problems.append(
                f"generator and lenvm have different vocabularies ({sizes[0]:,} and {sizes[1]:,} tokens): a length "
                "value model serves generators that share its tokenizer"
            )
        if given.compile and (missing := missing_for_compile(given.generator.device)) is not None:
            self._problems.append(missing)

    def _check_whole(self, name: str, number: Any, what: str, least: int | None = 1) -> None:
        if not is_integer(number) or (least is not None and number < least):
            self._problems.append(f"{name} must be {what}, whole; got {number!r}")

    def _controls(self) -> list[Control | None]:
        controls = self._per_prompt("control", self._given.control)
        for row, control in enumerate(controls):
            if control is None:
                continue
            if self._given.lenvm is None:
                self._problems.append("control needs lenvm, a length value model; got None")
            if not is_control(control):
                self._problems.append(f"control {control!r} of prompt {row} is none: use EqualTo(128), Tilt(-5), …")
            elif numbers_for_a_batch(control):
                self._problems.append("control has numbers for several rows: give a list, one control for each prompt")
            elif self._given.lenvm is not None:
                against = why_not_until(control, self._given.lenvm.config.until, tokenizer_of(self._given.tokenizer))
                self._problems += [against] if against else []
        return controls

    def _stops(self) -> tuple[str, ...]:
        stop = self._given.stop
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if stops and self._given.tokenizer is None:
            self._problems.append("stop needs tokenizer: without it nobody can read what was written")
        if "" in stops:
            self._problems.append("stop has an empty string, which is everywhere")
        return tuple(text for text in stops if text)

    def _end_ids(self) -> frozenset[int]:
        given = self._given.eos_token_id
        if given is None:
            return stop_ids_of(self._given.generator, self._given.tokenizer)
        ids = given if isinstance(given, Sequence) else [given]
        for token in ids:
            self._check_whole("eos_token_id", token, "a token's id", least=0)
        return frozenset(ids)

    def _params(self, stops: tuple[str, ...]) -> list[tuple[SamplingParams, int | None]]:
        """Params of each prompt, and the limit that was given for it."""
        given, count = self._given, len(self._prompts)
        # A single seed s stands for s, s + 1, …
        seed = [given.seed + row for row in range(count)] if is_integer(given.seed) else given.seed  # type: ignore[operator]
        columns = {
            name: self._per_prompt(name, value)
            for name, value in (
                ("temperature", given.temperature), ("top_k", given.top_k), ("top_p", given.top_p),
                ("min_p", given.min_p), ("seed", seed),
            )
        }  # fmt: skip
        limits = self._per_prompt("max_tokens", given.max_tokens)
        found = []
        for row in range(count):
            of_row = {name: column[row] for name, column in columns.items()}
            try:
                params = SamplingParams(**of_row, stop=stops)
            except ValueError as error:
                self._problems.append(str(error))
                params = SamplingParams()
            limit, before = limits[row], len(self._problems)
            if limit is not None:
                self._check_whole("max_tokens", limit, "at least 1")
            found.append((params, limit if len(self._problems) == before else None))
        return found

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

    # -- requests ---

    def _add_request(self, row: int, control: Control | None, params: SamplingParams, limit: int | None) -> None:
        ids = self._prompts[row]
        models = list(self._models.values())
        against = contradiction(control, limit)
        if against:
            self._problems.append(against)
        unreadable = why_unreadable(models, ids, _has_images(self._vision), self._given.tokenizer)
        problem = f"inputs: {unreadable}" if unreadable else why_no_room(models, len(ids), control, limit)
        if problem:
            self.failed.append((row, problem))
            return
        target = target_of(control)
        default = room_for(target, until_of(control))
        tokens = int(min(limit or default, context_window(models) - len(ids)))
        # Where there are problems nothing is written, and n may be no number.
        seeds = [] if self._problems else [completion_seed(params.seed, "", index) for index in range(self.n)]
        given = self._given
        ending = _ending(row, params.stop, given.tokenizer, given.ends)
        self._requests.append(Request(row, ids, seeds, replace(params, max_tokens=tokens), control, ends=ending))


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
    try:
        if rows is None or _has_images(given):
            raise TypeError("no lists of ids")
        lists = [[as_whole(token) for token in row] for row in rows]
        masks = given.get("attention_mask")
        if masks is None:
            return lists
        read = []
        for ids, mask in zip(lists, masks, strict=True):
            read.append([token for token, seen in zip(ids, mask, strict=True) if seen])
        return read
    except (TypeError, ValueError) as error:
        found = ", ".join(given) if rows is None or _has_images(given) else repr(rows)[:60]
        raise GenerationError(
            "inputs must be what a processor returns with return_tensors='pt', or a list of token ids for each prompt; "
            f"got {found}"
        ) from error


def _has_images(inputs: dict[str, Any]) -> bool:
    return any(name.startswith("pixel_values") for name in inputs)


def reads_images(model: PreTrainedModel) -> bool:
    """Whether a model takes images."""
    return model.config.get_text_config() is not model.config


def _ending(
    row: int, stops: tuple[str, ...], tokenizer: Any, ends: Callable[[int, list[int]], bool] | None
) -> Callable[[list[int]], bool] | None:
    """Whether what was written for a prompt is to end."""
    at_stop = ends_with_stop(stops, tokenizer)
    if ends is None:
        return at_stop

    def ending(ids: list[int]) -> bool:
        return (at_stop is not None and at_stop(ids)) or ends(row, ids)

    return ending
