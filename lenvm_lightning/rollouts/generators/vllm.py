"""Sampling with vLLM in this process: ``vllm:NAME`` instead of a server.

vLLM's own engine decides what is written when, and its settings are those of ``vllm serve``: ``tensor_parallel_size``,
``data_parallel_size``, ``gpu_memory_utilization``, … Prompts are encoded here, so that ids are those of
`LocalGenerator`; images it does not take here: serve the model, and give the address. With a length value model,
`serving.vllm` guides.
"""

import asyncio
import dataclasses
import itertools
import os
import queue
import threading
import weakref
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any

from ...decoding.control_text import control_as_text
from ...decoding.limits import contradiction
from ...decoding.sampling_params import SamplingParams, completion_seed
from ...errors import CheckpointError, GenerationError, GeneratorError, nearest, reason_of
from ...guidance import until_of
from ...models.hub_files import resolve
from ...models.processors import load_processor, tokenizer_of
from ...utils.reading import first_line
from ..prompting import encode_prompt
from .interface import Answer, Failure, GeneratedText, PromptRequest
from .local.loading import digest, name_of

_WHERE_IT_RUNS = (
    "tensor_parallel_size", "data_parallel_size", "pipeline_parallel_size", "distributed_executor_backend",
    "gpu_memory_utilization", "max_num_seqs", "max_num_batched_tokens", "max_model_len", "enforce_eager", "block_size",
    "disable_log_stats", "lenvm", "gamma", "dtype",
)  # fmt: skip
_PROCESSOR = "lenvm_lightning.serving.vllm:LenVMLogitsProcessor"
_AHEAD = 2  # requests given to the engine for each that it can write at once


def deciding_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of vLLM's settings that may change tokens: all but those of where it runs, and those told elsewhere."""
    return {name: one for name, one in sorted(options.items()) if name not in _WHERE_IT_RUNS and one is not None}


class VLLMGenerator:
    """A text model that writes completions in vLLM.

    Args:
        source: a directory, a hub id or an embedded name.
        lenvm: length value model for requests with a control; where None, they are refused.
        gamma: of a length value model whose folder does not say.
        seeds: whether requests carry seeds, so that each completion can be sampled again. Where None, unless vLLM runs
            on a CPU: some of its builds die of seeds. Guided requests have theirs in any case.
        **engine: vLLM's own settings, those of its ``AsyncEngineArgs``.

    Attributes:
        name: of the model, written into every record.
        processor: tokenizer of its vocabulary.
        tokens_written: of completions that have ended.

    Raises:
        GeneratorError: there is no vLLM, it does not know a setting, or it does not start.
    """

    def __init__(
        self,
        source: str,
        *,
        lenvm: str | None = None,
        gamma: float | None = None,
        seeds: bool | None = None,
        **engine: Any,
    ) -> None:
        self._source = source
        self.name = name_of(self._source)
        self.tokens_written = 0
        try:
            trusted = bool(engine.get("trust_remote_code", False))
            self.processor = load_processor(self._source, trust_remote_code=trusted)
        except CheckpointError as error:
            raise GeneratorError(f"{error} A generator needs the tokenizer it was trained with.") from error
        self.tokenizer = tokenizer_of(self.processor)
        self._deciding = deciding_options({**engine, "seeds": seeds})
        self._guides = lenvm is not None
        if lenvm is not None:
            told = {"model": lenvm, "gamma": gamma, "dtype": engine.get("dtype")}
            engine["logits_processors"] = [*engine.get("logits_processors", ()), _PROCESSOR]
            engine["additional_config"] = {"lenvm": {name: one for name, one in told.items() if one is not None}}
        self._running = _Running(self._source, engine)
        weakref.finalize(self, self._running.close)  # or training would find no memory after sampling
        config = self._running.engine.vllm_config
        self._dtype = str(config.model_config.dtype).removeprefix("torch.")
        self._window: int = config.model_config.max_model_len
        self._most = _AHEAD * config.scheduler_config.max_num_seqs * config.parallel_config.data_parallel_size
        self._seeds = _takes_seeds() if seeds is None else seeds
        self._numbers = itertools.count()

    def fingerprint(self) -> dict[str, Any]:
        """What identifies the model: kind, name, digest of its files, dtype, and settings that may change tokens."""
        known = {"kind": "vllm", "name": self.name, "digest": digest(self._source), "dtype": self._dtype}
        return {**known, "options": self._deciding} if self._deciding else known

    def sample(self, requests: Iterable[PromptRequest], sampling: SamplingParams) -> Iterator[Answer]:
        """Yield answers as they come; see `Generator`.

        Raises:
            GeneratorError: the engine has died.
            GenerationError: a request with a control, but no length value model, or a control without a text form.
        """
        jobs = self._jobs(requests, sampling)
        under_way: set[Future[Answer]] = set()
        ended: queue.SimpleQueue[Future[Answer]] = queue.SimpleQueue()
        try:
            while True:
                while len(under_way) < self._most and (job := next(jobs, None)) is not None:
                    if isinstance(job, Answer):
                        yield job
                        continue
                    future = asyncio.run_coroutine_threadsafe(self._complete(job), self._running.loop)
                    under_way.add(future)
                    future.add_done_callback(ended.put)
                if not under_way:
                    return
                under_way.discard(future := ended.get())
                yield future.result()
        finally:
            for future in under_way:
                future.cancel()

    def _jobs(self, requests: Iterable[PromptRequest], sampling: SamplingParams) -> "Iterator[_Job | Answer]":
        """Encode prompts; those that cannot be answered are answered here."""
        for asked in requests:
            if asked.control is not None and not self._guides:
                raise GenerationError(
                    f"control {asked.control} needs lenvm, a length value model; {self.name} has none"
                )
            if until_of(asked.control) is not None:
                raise GenerationError(f"control {asked.control} ends a segment, which needs a local generator")
            text = None if asked.control is None else control_as_text(asked.control)
            try:
                ids = self._encode(asked, sampling.max_tokens)
            except (ValueError, TypeError, KeyError, IndexError) as error:
                yield from asked.failures(reason_of(error))
                continue
            for number in asked.numbers:
                seed = completion_seed(sampling.seed, asked.prompt.prompt_id, number)
                yield _Job(asked.prompt.prompt_id, number, ids, text, seed, sampling)

    def _encode(self, asked: PromptRequest, most: int) -> list[int]:
        """Ids of a prompt.

        Raises:
            ValueError: it cannot be answered.
        """
        prompt = asked.prompt
        if against := contradiction(asked.control, most):
            raise ValueError(against)
        if prompt.images:
            raise ValueError(
                "vllm: reads no images here: serve the model with `vllm serve`, and give its http:// address"
            )
        ids = [*encode_prompt(self.processor, prompt.messages, [])[0], *prompt.begun]
        if not ids:
            raise ValueError("the prompt is empty")
        if len(ids) + most > self._window:
            raise ValueError(
                f"a prompt of {len(ids):,} tokens and {most:,} more are more than the context window, {self._window:,}"
            )
        return ids

    async def _complete(self, job: "_Job") -> Answer:
        """Let the engine write one completion.

        Raises:
            GeneratorError: the engine has died.
        """
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        seed = job.seed if self._seeds or job.control is not None else None
        try:
            params = job.params(self._seeds)
            output = await _last(
                self._running.engine.generate(
                    {"prompt_token_ids": job.prompt_ids}, params, request_id=f"lenvm-{next(self._numbers)}"
                )
            )
        except EngineDeadError as error:
            raise GeneratorError(
                f"vLLM has died while it wrote: {first_line(error)} What it said stands above."
            ) from error
        except EngineGenerateError as error:
            return job.answer(Failure(first_line(error), final=False))
        except ValueError as error:
            return job.answer(Failure(first_line(error), final=True))
        [found] = output.outputs
        ids = list(found.token_ids)
        self.tokens_written += len(ids)
        if found.finish_reason not in ("stop", "length"):
            return job.answer(Failure(f"vLLM ended it for another reason: {found.finish_reason}", final=False))
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return job.answer(GeneratedText(text, ids, found.finish_reason, found.cumulative_logprob, seed))


@dataclasses.dataclass(frozen=True)
class _Job:
    """One completion to write."""

    prompt_id: str
    number: int
    prompt_ids: list[int]
    control: str | None
    seed: int
    sampling: SamplingParams

    def params(self, seeds: bool) -> Any:
        """As vLLM takes them; log-probabilities are those before temperature, truncation and control."""
        from vllm import SamplingParams as VLLMParams
        from vllm.sampling_params import RequestOutputKind

        sampling = self.sampling
        guided = {"lenvm": self.control, "lenvm_completion_seed": self.seed} if self.control is not None else None
        return VLLMParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            max_tokens=sampling.max_tokens,
            seed=self.seed if seeds and guided is None else None,
            stop=list(sampling.stop),
            include_stop_str_in_output=True,
            logprobs=0,
            extra_args=guided,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def answer(self, result: GeneratedText | Failure) -> Answer:
        """The answer to it."""
        return Answer(self.prompt_id, self.number, result)


async def _last(outputs: "AsyncGenerator[Any, None]") -> Any:
    """The one output of a request that is told when it has ended."""
    [output] = [output async for output in outputs]
    return output


class _Running:
    """An engine, and the event loop that it lives on, in a thread of its own.

    Args:
        source: of the model.
        settings: of the engine.

    Raises:
        GeneratorError: there is no vLLM, or it does not start.
    """

    def __init__(self, source: str, settings: dict[str, Any]) -> None:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        try:
            from vllm import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM
        except ImportError as error:
            raise GeneratorError(
                f"vllm:{source} needs vLLM in this environment, and it cannot be imported ({error}): "
                "pip install vllm. Or serve the model elsewhere, and give the server's http:// address."
            ) from error
        known = [field.name for field in dataclasses.fields(AsyncEngineArgs) if field.name != "model"]
        unknown = [f"{name!r}{nearest(name, known)}" for name in settings if name not in known]
        if unknown:
            raise GeneratorError(f"vLLM takes no {', no '.join(unknown)}")
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, name="vllm", daemon=True).start()

        async def start() -> Any:
            return AsyncLLM.from_engine_args(AsyncEngineArgs(model=resolve(source), **settings))

        try:
            self.engine = asyncio.run_coroutine_threadsafe(start(), self.loop).result()
        except Exception as error:  # whatever keeps vLLM from starting, it has said above
            self.loop.call_soon_threadsafe(self.loop.stop)
            raise GeneratorError(f"vLLM does not start with {source}: {first_line(error)}") from error

    def close(self) -> None:
        """End the engine, its processes too."""

        async def end() -> None:
            if self.engine.output_handler is not None:  # or it takes the end of the engine for its death
                self.engine.output_handler.cancel()
                await asyncio.sleep(0)
            self.engine.shutdown()

        asyncio.run_coroutine_threadsafe(end(), self.loop).result()
        self.engine = None  # it cannot be let go of when the interpreter ends
        self.loop.call_soon_threadsafe(self.loop.stop)


def _takes_seeds() -> bool:
    """Whether this build of vLLM has seeds that work: those for CPUs die of them."""
    from vllm.platforms import current_platform

    return not current_platform.is_cpu()
