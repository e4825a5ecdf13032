"""Sampling from a transformers model in this process.

A completion is sampled with its own seed, one uniform number a token, and depends on nothing else: not on the prompts
and completions beside it, their order, the number of rows, or on whether a run was interrupted. In float32 and float64
on a CPU that holds bit for bit (measured with MKL and AVX-512; ``tests/rollouts/generators/local/test_generator.py``
tests it where you are), on a GPU for the distribution: there the size of a batch decides how its products round, and
once in very many tokens a rounding moves one across the border of its share. In bfloat16 it is so on a CPU, too.

Why not ``generate_batch``, transformers' own continuous batching: it draws from the global random state, so that a
completion depends on its batch and an interrupted run cannot be continued; it takes no images; and on a CPU it wrote
a fortieth of the tokens a second (shape of tiny-text, transformers 5.23).
"""

import itertools
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from ....decoding.attention import is_exact
from ....decoding.engine import Engine
from ....decoding.kv_cache import FEWEST_ROWS
from ....decoding.limits import contradiction, why_no_room, why_unreadable
from ....decoding.model_runner import moved_to
from ....decoding.prefill import Request
from ....decoding.running_completion import RunningCompletion
from ....decoding.sampling_params import SamplingParams, completion_seed
from ....decoding.segments import why_not_until
from ....decoding.side_by_side import written
from ....decoding.text_stream import ends_with_stop
from ....decoding.vocabulary import forbidden_ids, placeholder_ids, stop_ids_of
from ....errors import CheckpointError, GenerationError, GeneratorError, reason_of
from ....guidance import Control
from ....models.processors import load_processor, tokenizer_of
from ....models.value_model import LengthValueModel
from ....utils.images import open_image
from ....utils.memory import free_memory, is_of_memory
from ....utils.threads import is_small
from ...prompting import encode_prompt
from ...record import IMAGE_MARK
from ..interface import Answer, Failure, GeneratedText, Prompt, PromptRequest
from .loading import digest, load_model, name_of
from .one_by_one import write_with_generate

_MOST_ROWS = 256  # however much memory there is
_MOST_ENGINES = 4  # threads of them share the interpreter
_ROOM = 1024  # tokens a row is expected to hold, for the choice of their number


class LocalGenerator:
    """A text or vision-language model that writes completions; see the head of this module.

    Ids of image and video placeholders, and ids that the tokenizer has no token for, are never sampled.

    Args:
        model: with its vocabulary head, in eval mode.
        processor: its processor, or its tokenizer where it reads text only.
        name: written into every record.
        rows: completions written side by side; where None, what fits into a quarter of the free memory of a CPU, or
            40% of that of a GPU, 16 to 256.
        digest: of config and weights, for the fingerprint.
        lenvm: length value model of the same vocabulary, for requests with a control.

    Attributes:
        tokenizer: that of the processor.
        takes_images: whether it reads more than text.
        stop_ids: that end a completion.
        tokens_written: by all calls of `sample`, those of unfinished completions among them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        name: str,
        *,
        rows: int | None = None,
        digest: str | None = None,
        lenvm: LengthValueModel | None = None,
    ) -> None:
        if rows is not None and rows < 1:
            raise GeneratorError(f"rows must be at least 1, got {rows}")
        self.name = name
        self.tokens_written = 0
        self.model = model
        self.processor = processor
        self.tokenizer = tokenizer_of(processor)
        self.takes_images = hasattr(processor, "image_processor")
        self.lenvm = lenvm
        self._digest = digest
        self._placeholders = placeholder_ids(model, processor)
        self.stop_ids = stop_ids_of(model, processor)
        self._warned: set[str] = set()
        self.rows = rows or _rows_for(model)

    @classmethod
    def load(
        cls,
        source: str,
        *,
        dtype: str | None = None,
        device: str | None = None,
        rows: int | None = None,
        trust_remote_code: bool = False,
    ) -> "LocalGenerator":
        """Load a generator.

        Args:
            source: embedded name, directory or hub id.
            dtype: ``float32``, ``bfloat16``, …; where None, see `models.dtypes.usual_dtype`.
            device: where None, a GPU if there is one.
            rows: completions written side by side; more are faster and take more memory. Chosen where None.
            trust_remote_code: run modelling code that comes with the checkpoint.

        Raises:
            GeneratorError: it cannot be loaded; the text says what was looked for.
        """
        model = load_model(source, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        try:
            processor = load_processor(source, trust_remote_code=trust_remote_code)
        except CheckpointError as error:
            raise GeneratorError(f"{error} A generator needs the tokenizer it was trained with.") from error
        return cls(model, processor, name_of(source), rows=rows, digest=digest(source))

    def fingerprint(self) -> dict[str, Any]:
        """What identifies the model: kind, name, digest of its files, dtype."""
        dtype = str(self.model.dtype).removeprefix("torch.")
        return {"kind": "transformers", "name": self.name, "digest": self._digest, "dtype": dtype}

    def sample(self, requests: Iterable[PromptRequest], sampling: SamplingParams) -> Iterator[Answer]:
        """Yield one answer for each number of each request, as soon as it is there, in any order.

        A prompt that is empty, too long, or has images that cannot be read or that the model does not take fails for
        good, and so does a completion whose logits are NaN; the others go on.

        Raises:
            GeneratorError: the device has not enough memory.
            GenerationError: a request with a control, but no length value model, one that counts to something else, or
                one that cannot be decoded in rows of a cache.
        """
        count = _engines_for(self.model, self.rows)
        left = iter(requests)
        first = list(itertools.islice(left, count))
        engines = self.engines(min(count, max(1, len(first))))
        requests_or_answers = self._requests(itertools.chain(first, left), sampling, engines[0] if engines else None)
        try:
            if not engines:
                for answer in requests_or_answers:
                    if isinstance(answer, Answer):
                        self.tokens_written += len(getattr(answer.result, "token_ids", ()))
                        yield answer
                return
            for item in written(engines, requests_or_answers):
                if isinstance(item, Answer):
                    yield item
                    continue
                self.tokens_written += item.tokens
                yield from map(self._answer, item.ended)
        except (RuntimeError, MemoryError) as error:
            if not is_of_memory(error):
                raise
            raise GeneratorError(
                f"{self.name} ran out of memory on {self.model.device} with {self.rows} rows. Use fewer "
                f"(rows={max(1, self.rows // 2)}), a smaller max_tokens, or a smaller dtype."
            ) from error

    def engines(self, count: int) -> "list[Engine[Any]]":
        """So many engines over this generator, its rows divided among them.

        Returns:
            An empty list where the model cannot be decoded in rows and no length value model needs that.

        Raises:
            GenerationError: a length value model that cannot be, or a generator beside one.
        """
        fewest = FEWEST_ROWS if is_exact(self.model) else 1  # elsewhere no size makes all batches round alike
        try:
            return [
                Engine(
                    self.model,
                    self.lenvm,
                    processor=self.processor,
                    stop_ids=self.stop_ids,
                    max_rows=self.rows // count,
                    fewest_rows=fewest,
                )
                for _ in range(count)
            ]
        except GenerationError as error:
            if self.lenvm is not None:
                raise
            self._warn_slow(str(error))
            return []

    def _requests(
        self, requests: Iterable[PromptRequest], sampling: SamplingParams, engine: "Engine[Answer] | None"
    ) -> Iterator[Request | Answer]:
        """Encode prompts; those that fail are answered here, and those of models that cannot be decoded in rows."""
        for asked in requests:
            prompt = asked.prompt
            if asked.control is not None and self.lenvm is None:
                raise GenerationError(
                    f"control {asked.control} needs lenvm, a length value model; {self.name} has none"
                )
            if self.lenvm is not None and (
                against := why_not_until(asked.control, self.lenvm.config.until, self.tokenizer)
            ):
                raise GenerationError(against)
            try:
                ids, inputs = self.encode(prompt, sampling, asked.control)
            except (ValueError, TypeError, KeyError, IndexError) as error:
                yield from asked.failures(reason_of(error))
                continue
            seeds = [completion_seed(sampling.seed, prompt.prompt_id, number) for number in asked.numbers]
            ends = ends_with_stop(sampling.stop, self.tokenizer)
            request = Request(asked, ids, seeds, sampling, asked.control, inputs, ends, limit=asked.limit)
            reason_against = engine.why_not(request) if engine is not None else ""
            if reason_against is None:
                yield request
            elif self.lenvm is None:
                self._warn_slow(reason_against)
                forbidden = forbidden_ids(self.model, None, self.processor)
                yield from write_with_generate(self.model, request, self.stop_ids, forbidden, self.text_of)
            else:
                yield from asked.failures(f"{reason_against}, and guided decoding knows no other way")

    def _answer(self, completion: RunningCompletion) -> Answer:
        """A completion that has ended, as its request wants it."""
        asked, seed = completion.request.key, completion.request.seeds[completion.index]
        reason, ids = completion.finish_reason, completion.token_ids
        if reason == "stop" or reason == "length":
            result: GeneratedText | Failure = GeneratedText(self.text_of(ids), ids, reason, completion.logprob, seed)
        else:
            result = Failure(str(completion.error), final=True)
        return Answer(asked.prompt.prompt_id, asked.numbers[completion.index], result)

    def encode(
        self, prompt: Prompt | list[int], sampling: SamplingParams, control: Control | None = None
    ) -> tuple[list[int], dict[str, Any]]:
        """Token ids of a prompt, and what the model takes beside them.

        Args:
            prompt: messages, or ids as they are.
            sampling: how it is to be answered; there must be room for ``max_tokens``.
            control: of the length; there must be room for its target.

        Raises:
            ValueError: it cannot be answered; the text says why.
        """
        if isinstance(prompt, list):
            self._require_answerable(prompt, False, sampling, control)
            return prompt, {}
        marks = sum(message["content"].count(IMAGE_MARK) for message in prompt.messages)
        if marks != len(prompt.images):
            raise ValueError(f"{marks} {IMAGE_MARK} marks in the prompt but {len(prompt.images)} images")
        if marks and not self.takes_images:
            raise ValueError(f"the prompt has images, but {self.name} reads text only")
        ids, inputs = encode_prompt(self.processor, prompt.messages, [open_image(image) for image in prompt.images])
        ids += prompt.begun
        self._require_answerable(ids, bool(marks), sampling, control)
        if marks and ids[-1] in self._placeholders:
            raise ValueError("the prompt ends with an image: ask something about it, or give the model a chat template")
        return ids, self._inputs(ids, inputs) if marks else {}

    def _require_answerable(
        self, ids: list[int], has_images: bool, sampling: SamplingParams, control: Control | None
    ) -> None:
        """Refuse ids that the models cannot read, or have no room behind.

        Raises:
            ValueError: see `encode`.
        """
        models = [self.model, *([self.lenvm.backbone] if self.lenvm else [])]
        against = why_unreadable(models, ids, has_images, self.processor)
        against = against or why_no_room(models, len(ids), control, sampling.max_tokens)
        against = against or contradiction(control, sampling.max_tokens)
        if against:
            raise ValueError(against)

    def _inputs(self, ids: list[int], vision: dict[str, Any]) -> dict[str, Any]:
        """What the model takes for a prompt with images, on its device."""
        input_ids = torch.tensor([ids])
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **vision}
        return moved_to(self.model, inputs)

    def _warn_slow(self, reason: str) -> None:
        if reason and reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(
                f"{self.name} ({type(self.model).__name__}) does not work with continuous batching: {reason}. It "
                "samples prompt by prompt through transformers' generate, which is slower.",
                stacklevel=2,
            )

    def text_of(self, token_ids: list[int]) -> str:
        """The text of token ids, without special tokens."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)


def _engines_for(model: PreTrainedModel, rows: int) -> int:
    """Engines to write with side by side: on a CPU, one for each thread, as long as each has rows enough."""
    if model.device.type != "cpu" or is_small(model):
        return 1
    return max(1, min(torch.get_num_threads(), rows // FEWEST_ROWS, _MOST_ENGINES))


def _rows_for(model: PreTrainedModel) -> int:
    """Rows that fit, each with room for 1,024 tokens."""
    config = model.config.get_text_config()
    if not hasattr(config, "num_attention_heads"):  # no keys and values: it samples prompt by prompt
        return 1
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    row = 2 * config.num_hidden_layers * heads * size * model.dtype.itemsize * _ROOM
    # A layout copies the rows once more, and a length value model keeps some of its own.
    room = 0.4 * torch.cuda.mem_get_info(model.device)[0] if model.device.type == "cuda" else 0.25 * free_memory()
    return max(FEWEST_ROWS, min(_MOST_ROWS, int(room / row)))
