"""Length control in a stock vLLM: a logits processor, no fork.

    LENVM_MODEL=runs/q/model vllm serve MODEL --logits-processors lenvm_lightning.serving.vllm:LenVMLogitsProcessor

or ``LLM(MODEL, logits_processors=["lenvm_lightning.serving.vllm:LenVMLogitsProcessor"])``. The length value model comes
from ``$LENVM_MODEL``, or from ``--additional-config '{"lenvm": {"model": "runs/q/model"}}'``. A request names its
control: ``vllm_xargs: {"lenvm": "equal-to:128"}``, in Python ``SamplingParams(extra_args={"lenvm": "equal-to:128"})``.

The processor chooses the token of each guided request as `generate` does, with the request's own temperature, top_k,
top_p, min_p and seed, and leaves vLLM nothing else to sample. Requests without a control are not touched. vLLM decides
what runs when, so a request may be preempted, moved, or have its choice thrown away (a prompt that is prefilled in
chunks): `GuidedRows` keeps up.

The class has both of vLLM's interfaces, and each runner sees its own: the V1 runner (`vllm.v1.sample.logits_processor`,
CPUs and older versions), which tells how its batch changes, and Model Runner V2
(`vllm.v1.worker.gpu.sample.logits_processor`), which has a slot for each request and no word for those that leave.
"""

import json
import os
import random
from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality
from vllm.v1.sample.logits_processor import LogitsProcessor as V1Processor

from ..decoding.control_text import parse_control
from ..decoding.limits import contradiction
from ..decoding.sampling_params import GUIDED_SAMPLING, SamplingParams, completion_seed
from ..decoding.vocabulary import SPARE_IDS, embedding_rows
from ..errors import LenVMError
from ..guidance import Control, until_of
from ..models.dtypes import open_value_model
from ..models.value_model import LengthValueModel
from .guided_rows import GuidedRow, GuidedRows

_MODEL = "LENVM_MODEL"
_ARGUMENT, _SEED = "lenvm", "lenvm_seed"
_COMPLETION_SEED = "lenvm_completion_seed"  # as `completion_seed` makes one
_GIB = 2**30
_log = init_logger("vllm.lenvm")

try:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as V2Processor
except ImportError:  # a vLLM that has V1 alone

    class V2Processor:  # type: ignore[no-redef]
        """Nothing."""


class LenVMLogitsProcessor(V1Processor, V2Processor):
    """See the module.

    Args:
        vllm_config: of the engine.
        place: where logits are, a device, from the V1 runner; from V2 the state of its requests.
        is_pin_memory: from the V1 runner.

    Raises:
        ValueError: no length value model is named, it cannot be loaded or has another vocabulary, or the engine
            speculates.
    """

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuse a guided request that cannot be, before it is scheduled: later the engine would die of it.

        Raises:
            ValueError: its control, its seed or its sampling means nothing, or its max_tokens contradicts the control.
        """
        control = _control_of(sampling_params)
        if control is None:
            return
        if against := contradiction(control, sampling_params.max_tokens):
            raise ValueError(f"vllm_xargs.lenvm: {against}")
        try:
            _seed_of(sampling_params)
            _sampling_of(sampling_params)
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(f"vllm_xargs.lenvm: {error}") from error

    def __init__(self, vllm_config: Any, place: Any, is_pin_memory: bool | None = None) -> None:
        if vllm_config.speculative_config is not None:
            raise ValueError("lenvm: with speculative decoding a step writes several tokens, which nobody can guide")
        self._states = None if is_pin_memory is not None else place  # of V2
        device = torch.device(place if self._states is None else self._states.device)
        lenvm = _open(vllm_config, device)
        if lenvm.config.until is not None:
            raise ValueError(
                f"lenvm: the length value model counts to {lenvm.config.until!r}, and in vLLM only lengths of whole "
                "texts are controlled: use another one, or lenvm serve"
            )
        size = vllm_config.model_config.get_vocab_size()
        known = embedding_rows(lenvm.backbone)
        if abs(known - size) >= SPARE_IDS:
            raise ValueError(
                f"lenvm: the length value model knows {known:,} tokens and the generator {size:,}: it serves "
                "generators that share its tokenizer"
            )
        self._guided = GuidedRows(lenvm, torch.arange(known, size, device=device) if known < size else None)
        self._stop_ids = _stop_ids_of(vllm_config.model_config)
        self._rows: dict[int, GuidedRow] = {}  # of guided requests, by their place in V1's batch, or V2's slot
        _log.info("lenvm: %s", _memory_told(lenvm, vllm_config))

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        """Leave each guided request the one token that was chosen. Shape (B, V)."""
        places = self._places_of_v2(ctx) if ctx is not None else {place: place for place in self._rows}
        if not places:
            return logits
        rows = [self._rows[key] for key in places.values()]
        index = torch.tensor(list(places), device=logits.device)
        tokens = self._guided.choose(rows, logits[index])
        sound = tokens >= 0  # where nothing could be chosen, vLLM samples from the logits as they are
        logits[index[sound]] = -torch.inf
        logits[index[sound], tokens[sound]] = 0.0
        return logits

    # -- the V1 runner ---

    def is_argmax_invariant(self) -> bool:
        """A control chooses other tokens than the likeliest."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Take in which requests came, went and moved."""
        if batch_update is None:
            return
        for place in batch_update.removed:
            self._forget(place)
        for place, params, prompt_ids, written in batch_update.added:
            self._forget(place)
            if prompt_ids:
                self._add(place, params, list(prompt_ids), written)
        for source, target, direction in batch_update.moved:
            moved, other = self._rows.pop(source, None), self._rows.pop(target, None)
            if moved is not None:
                self._rows[target] = moved
            if other is not None and direction == MoveDirectionality.SWAP:
                self._rows[source] = other
            elif other is not None:
                self._guided.remove(other)

    # -- Model Runner V2 ---

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Take in a request; whoever had its slot before has left. Its tokens are read when it is written first."""
        self._forget(req_idx)
        return self._add(req_idx, sampling_params, [], [])

    def apply_staged_writes(self) -> None:
        """Nothing is staged."""

    def _places_of_v2(self, ctx: Any) -> dict[int, int]:
        """Rows of the logits, and the slot of each, where a guided request is written; their tokens are caught up."""
        places = {row: slot for row, slot in enumerate(ctx.idx_mapping_np.tolist()) if slot in self._rows}
        if not places:
            return {}
        index = torch.tensor(list(places), device=ctx.pos.device)
        facts = torch.stack([ctx.pos[index].long(), ctx.input_ids[index].long()]).tolist()  # the one wait
        ready = {}
        for (row, slot), position, last in zip(places.items(), *facts, strict=True):
            if self._catch_up(slot, position + 1, last):
                ready[row] = slot
        return ready

    def _catch_up(self, slot: int, length: int, last: int) -> bool:
        """Bring the tokens of a slot up to so many; False where that is not yet its whole prompt."""
        assert self._states is not None
        row, prompt_length = self._rows[slot], int(self._states.prompt_len.np[slot])
        if length < prompt_length:
            return False
        known = len(row.prompt_ids) + len(row.written)
        if known == length - 1 and row.prompt_ids:
            row.written.append(last)
        elif known != length:
            ids = [*self._states.all_token_ids.gpu[slot, : length - 1].tolist(), last]
            row.prompt_ids, row.written = ids[:prompt_length], ids[prompt_length:]
        return True

    # -- both ---

    def _forget(self, place: int) -> None:
        row = self._rows.pop(place, None)
        if row is not None:
            self._guided.remove(row)

    def _add(self, key: int, params: Any, prompt_ids: list[int], written: list[int]) -> bool:
        """Take in a request; False where nobody controls its length."""
        control = _control_of(params)
        if control is None:
            return False
        own = set() if params.ignore_eos else self._stop_ids
        stop_ids = frozenset({*own, *(params.stop_token_ids or ())})
        self._rows[key] = GuidedRow(prompt_ids, written, control, _sampling_of(params), _seed_of(params), stop_ids)
        return True


def _control_of(params: Any) -> Control | None:
    """The control of a request; None where it names none.

    Raises:
        ValueError: what it names is none.
    """
    text = (params.extra_args or {}).get(_ARGUMENT)
    if text is None:
        return None
    if not isinstance(text, str):
        raise ValueError(f"vllm_xargs.lenvm must be a text such as 'equal-to:128', found {text!r}")
    try:
        control = parse_control(text)
    except LenVMError as error:
        raise ValueError(f"vllm_xargs.lenvm: {error}") from error
    if until_of(control) is not None:
        raise ValueError(
            f"vllm_xargs.lenvm: {text!r} ends a segment, and in vLLM only lengths of whole texts are controlled: leave "
            "out until=, or use lenvm serve"
        )
    return control


def _seed_of(params: Any) -> int:
    """The seed of a request, made as `generate` makes it; ``lenvm_seed`` for builds of vLLM that die of their own."""
    own = params.extra_args or {}
    if _COMPLETION_SEED in own:
        return int(own[_COMPLETION_SEED])
    given = own.get(_SEED, params.seed)
    return random.getrandbits(31) if given is None else completion_seed(int(given), "", 0)


def _sampling_of(params: Any) -> SamplingParams:
    """How `generate` is told what vLLM was told; where nobody says top_k, as `generate` has it."""
    return SamplingParams(
        temperature=params.temperature,
        top_k=params.top_k if params.top_k > 0 else GUIDED_SAMPLING.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        max_tokens=params.max_tokens or SamplingParams().max_tokens,
    )


def _open(vllm_config: Any, device: torch.device) -> LengthValueModel:
    """The length value model that the engine was told of.

    Raises:
        ValueError: none was named, or it cannot be loaded.
    """
    added = vllm_config.additional_config
    given = added.get("lenvm", {}) if isinstance(added, dict) else {}
    source = given.get("model") or os.environ.get(_MODEL)
    if not source:
        raise ValueError(
            f"lenvm: no length value model is named. Set ${_MODEL} to its directory or hub id, or pass "
            f"--additional-config '{json.dumps({'lenvm': {'model': 'DIRECTORY'}})}'"
        )
    generator = str(vllm_config.model_config.model)
    options = {name: given.get(name) for name in ("gamma", "dtype")}
    try:
        return open_value_model(source, device=device, generator=generator, **options)
    except LenVMError as error:
        raise ValueError(f"lenvm: {error}") from error


def _stop_ids_of(model_config: Any) -> set[int]:
    """Ids that end a completion, by the generator's own settings."""
    found: set[int] = set()
    of_generation = model_config.try_get_generation_config().get("eos_token_id")
    for eos in (of_generation, getattr(model_config.hf_config, "eos_token_id", None)):
        found |= set(eos if isinstance(eos, list) else [] if eos is None else [eos])
    return found


def _memory_told(lenvm: LengthValueModel, vllm_config: Any) -> str:
    """What the length value model takes, beside vLLM's own memory."""
    config = lenvm.backbone.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    a_token = 2 * config.num_hidden_layers * heads * size * lenvm.backbone.dtype.itemsize
    weights = sum(parameter.nbytes for parameter in lenvm.parameters())
    rows = vllm_config.scheduler_config.max_num_seqs
    most = rows * vllm_config.model_config.max_model_len * a_token
    return (
        f"gamma {lenvm.gamma}, {weights / _GIB:.2f} GiB of weights, {a_token / 1024:.1f} KiB a token of a guided "
        f"request, at most {most / _GIB:.1f} GiB where {rows} of them fill the window; vLLM's own plan does not count "
        "this: leave room (--gpu-memory-utilization)"
    )
