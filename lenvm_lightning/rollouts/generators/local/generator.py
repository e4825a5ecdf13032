"""Sampling from a transformers model in this process.

A completion is drawn with its own seed, one uniform number a token, and depends on nothing else: not on the prompts and
completions beside it, their order, the number of slots, or on whether a run was interrupted. In float32 and float64 on
a CPU that holds bit for bit (measured with MKL and AVX-512; ``tests/test_local_sampler.py`` tests it where you are), on
a GPU for the distribution: there the size of a batch decides how its products round, and once in very many tokens a
rounding moves one across the border of its share.

Why not ``generate_batch``, transformers' own continuous batching: it draws from the global random state, so that a
completion depends on its batch and an interrupted run cannot be continued; it takes no pictures; and on a CPU it wrote
a fortieth of the tokens a second (shape of tiny-text, transformers 5.23).
"""

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedModel

from ....decoding.compatibility import open_lenvm
from ....decoding.engine import BROKEN, ContinuousBatch, Job, Row
from ....decoding.kv_cache import FEWEST_ROWS
from ....decoding.model_runner import SlotDecoder
from ....decoding.sampling_params import SamplingParams, completion_seed
from ....errors import CheckpointError, GenerationError, GeneratorError
from ....models.backbone import load_processor
from ....models.value_model import LengthValueModel
from ...prompting import encode_prompt, open_image, tokenizer_of
from ...record import IMAGE_MARK
from ..interface import Answer, Failure, GeneratedText, Prompt, PromptRequest
from .loading import digest, load_model, name_of
from .one_by_one import write_with_generate

_LARGEST_DIFFERENCE = {torch.float64: 1e-6, torch.float32: 1e-2}  # of two distributions, total variation; else 0.1
_MOST_SLOTS = 256
_ROOM = 1024  # tokens a slot is expected to hold, for the choice of their number


class LocalGenerator:
    """A text or vision-language model that writes completions; see the head of this module.

    Ids of image and video placeholders, and ids that the tokenizer has no token for, are never drawn.

    Args:
        model: with its vocabulary head, in eval mode.
        processor: its processor, or its tokenizer where it reads text only.
        name: written into every record.
        slots: completions written side by side; where None, what fits into 1 GiB on a CPU and 40% of the free memory
            of a GPU, 16 to 256.
        digest: of config and weights, for the fingerprint.
        lenvm: length value model of the same vocabulary, for requests with a control.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        name: str,
        *,
        slots: int | None = None,
        digest: str | None = None,
        lenvm: LengthValueModel | None = None,
    ) -> None:
        if slots is not None and slots < 1:
            raise GeneratorError(f"slots must be at least 1, got {slots}")
        self.name = name
        self.tokens_written = 0
        self.model = model
        self.processor = processor
        self._tokenizer = tokenizer_of(processor)
        self._takes_pictures = hasattr(processor, "image_processor")
        self.lenvm = lenvm
        self._digest = digest
        self._placeholders = _placeholders(model, processor)
        self._stop = frozenset(_stop_ids(model, self._tokenizer))
        self._limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._fits: dict[bool, bool] = {}  # pictures or not -> whether slots give what the model's own forward gives
        self._decoder: SlotDecoder | None = None
        try:
            self._decoder = SlotDecoder(model)
        except ValueError as error:
            self._say_slow(str(error))
        self.slots = slots or (_slots_for(model) if self._decoder else 1)

    @classmethod
    def load(
        cls,
        source: str,
        *,
        dtype: str | None = None,
        device: str | None = None,
        slots: int | None = None,
        trust_remote_code: bool = False,
    ) -> "LocalGenerator":
        """Load a generator.

        Args:
            source: embedded name, directory or hub id.
            dtype: ``float32``, ``bfloat16``, …; where None, the checkpoint's own on a GPU and float32 on a CPU.
            device: where None, a GPU if there is one.
            slots: completions written side by side; more are faster and take more memory. Chosen where None.
            trust_remote_code: run modelling code that comes with the checkpoint.

        Raises:
            GeneratorError: it cannot be loaded; the text says what was looked for.
        """
        model = load_model(source, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        try:
            processor = load_processor(source, trust_remote_code=trust_remote_code)
        except CheckpointError as error:
            raise GeneratorError(f"{error} A generator needs the tokenizer it was trained with.") from error
        return cls(model, processor, name_of(source), slots=slots, digest=digest(source))

    def fingerprint(self) -> dict[str, Any]:
        """What identifies the model: kind, name, digest of its files, dtype."""
        dtype = str(self.model.dtype).removeprefix("torch.")
        return {"kind": "transformers", "name": self.name, "digest": self._digest, "dtype": dtype}

    def sample(self, requests: Iterable[PromptRequest], sampling: SamplingParams) -> Iterator[Answer]:
        """Yield one answer for each number of each request, as soon as it is there, in any order.

        A prompt that is empty, too long, or has pictures that cannot be read or that the model does not take fails for
        good, and so does a completion whose logits are NaN; the others go on.

        Raises:
            GeneratorError: the device has not enough memory.
            GenerationError: a request with a control, but no length value model, or one that does not work in slots.
        """
        forbidden = self._forbidden()
        jobs = self._jobs(requests, sampling, forbidden)
        try:
            if self._decoder is None:
                yield from (answer for answer in jobs if isinstance(answer, Answer))
                return
            fewest = FEWEST_ROWS if self.model.device.type == "cpu" else 1  # what a GPU rounds, no size makes the same
            guide = open_lenvm(self.lenvm, fewest) if self.lenvm else None
            batch = ContinuousBatch[Answer](self._decoder, self.slots, self._stop, forbidden, guide)
            for item in batch.run(jobs):
                yield item if isinstance(item, Answer) else self._answer(item)
        except (RuntimeError, MemoryError) as error:
            if not _is_of_memory(error):
                raise
            raise GeneratorError(
                f"{self.name} ran out of memory on {self.model.device} with {self.slots} slots. Use fewer "
                f"(slots={max(1, self.slots // 2)}), a smaller max_tokens, or a smaller dtype."
            ) from error

    def _jobs(
        self, requests: Iterable[PromptRequest], sampling: SamplingParams, forbidden: Tensor | None
    ) -> Iterator[Job | Answer]:
        """Encode prompts; those that fail are answered here, and those of models that slots do not fit."""
        for request in requests:
            prompt = request.prompt
            if request.control is not None and self.lenvm is None:
                raise GenerationError(
                    f"control {request.control} needs lenvm, a length value model; {self.name} has none"
                )
            try:
                ids, inputs = self._encode(prompt, sampling)
            except (ValueError, TypeError, KeyError, IndexError, TemplateError) as error:
                reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
                for number in request.numbers:
                    yield Answer(prompt.prompt_id, number, Failure(reason, final=True))
                continue
            seeds = [completion_seed(sampling.seed, prompt.prompt_id, number) for number in request.numbers]
            job = Job(request, ids, seeds, sampling.max_tokens, sampling, request.control, inputs)
            if self._slots_fit(job):
                yield job
            elif self.lenvm is None:
                yield from write_with_generate(self.model, job, self._stop, forbidden, self._text)
            else:
                reason = f"{type(self.model).__name__} does not work in slots, which guided decoding needs"
                yield from (Answer(prompt.prompt_id, number, Failure(reason, True)) for number in request.numbers)

    def _answer(self, row: Row) -> Answer:
        """A completion that has ended, as its request wants it."""
        request, seed = row.job.key, row.job.seeds[row.index]
        result: GeneratedText | Failure = Failure(BROKEN, final=True)
        if row.finish == "stop" or row.finish == "length":
            result = GeneratedText(self._text(row.ids), row.ids, row.finish, row.logprob, seed)
        return Answer(request.prompt.prompt_id, request.numbers[row.index], result)

    def _encode(self, prompt: Prompt, sampling: SamplingParams) -> tuple[list[int], dict[str, Any]]:
        """Token ids of a prompt, and what the model takes beside them.

        Raises:
            ValueError: it cannot be answered; the text says why.
        """
        marks = sum(message["content"].count(IMAGE_MARK) for message in prompt.messages)
        if marks != len(prompt.images):
            raise ValueError(f"{marks} {IMAGE_MARK} marks in the prompt but {len(prompt.images)} images")
        if marks and not self._takes_pictures:
            raise ValueError(f"the prompt has images, but {self.name} reads text only")
        ids, inputs = encode_prompt(self.processor, prompt.messages, [open_image(image) for image in prompt.images])
        if not ids:
            raise ValueError("the prompt is empty")
        if self._limit is not None and len(ids) + sampling.max_tokens > self._limit:
            raise ValueError(
                f"the prompt has {len(ids)} tokens; with max_tokens {sampling.max_tokens} that is more than the "
                f"{self._limit} that {self.name} can hold"
            )
        if marks and ids[-1] in self._placeholders:
            raise ValueError("the prompt ends with an image: ask something about it, or give the model a chat template")
        if not marks and not self._placeholders.isdisjoint(ids):
            raise ValueError("an image or video token of the model stands where there is no image")
        return ids, self._inputs(ids, inputs) if marks else {}

    def _inputs(self, ids: list[int], vision: dict[str, Any]) -> dict[str, Any]:
        """What the model takes for a prompt with pictures, on its device."""
        input_ids = torch.tensor([ids])
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **vision}
        device, dtype = self.model.device, self.model.dtype
        return {
            name: value.to(device, dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
            if isinstance(value, Tensor)
        }

    def _slots_fit(self, job: Job) -> bool:
        """Whether slots give the distribution that the model's own forward gives; tried on the first prompt."""
        pictures = bool(job.inputs)
        if self._decoder is None or len(job.ids) < 2:
            return self._decoder is not None
        if pictures not in self._fits:
            try:
                difference = self._decoder.difference(job.ids, job.inputs)
            except Exception as error:  # a family that works otherwise; transformers' generate knows them all
                if _is_of_memory(error):
                    raise
                difference, reason = 1.0, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            else:
                reason = f"its next-token distribution differs by {difference:.2g}"
            self._fits[pictures] = not difference > _LARGEST_DIFFERENCE.get(self.model.dtype, 0.1)  # NaN is no reason
            if not self._fits[pictures]:
                self._say_slow(reason)
        return self._fits[pictures]

    def _say_slow(self, reason: str) -> None:
        warnings.warn(
            f"{self.name} ({type(self.model).__name__}) does not work with continuous batching: {reason}. It samples "
            "prompt by prompt through transformers' generate, which is slower.",
            stacklevel=2,
        )

    def _forbidden(self) -> Tensor | None:
        """Ids that are never drawn. Shape (n,), int64."""
        size = self.model.get_output_embeddings().weight.shape[0]
        ids = sorted({i for i in self._placeholders if i < size} | set(range(len(self._tokenizer), size)))
        return torch.tensor(ids, device=self.model.device) if ids else None

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


def _is_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def _stop_ids(model: PreTrainedModel, tokenizer: Any) -> set[int]:
    """Ids that end a completion, from the first place that names any."""
    configs = (model.generation_config, model.config, model.config.get_text_config(), tokenizer)
    for ids in (getattr(config, "eos_token_id", None) for config in configs):
        if ids is not None:
            return set(ids) if isinstance(ids, list | tuple) else {int(ids)}
    return set()


def _placeholders(model: PreTrainedModel, processor: Any) -> set[int]:
    """Ids that stand for parts of images, videos and sounds."""
    names = [f"{kind}_token_{suffix}" for kind in ("image", "video", "audio") for suffix in ("id", "index")]
    found = (getattr(place, name, None) for place in (model.config, processor) for name in names)
    return {token for token in found if isinstance(token, int)}


def _slots_for(model: PreTrainedModel) -> int:
    """Slots that fit, each with room for 1,024 tokens."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    slot = 2 * config.num_hidden_layers * heads * size * model.dtype.itemsize * _ROOM
    room = 0.4 * torch.cuda.mem_get_info(model.device)[0] if model.device.type == "cuda" else 2.0**30
    return max(16, min(_MOST_SLOTS, int(room / slot)))
