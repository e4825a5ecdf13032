"""The engine in a thread of its own, for requests that come at any time and clients that leave.

The engine takes requests as rows are free, so all that a server adds is a source that is empty now and then, and the
way back: what a step has written goes to the event loop of whoever asked, once a step.

Where those that wait do not start as they came, see `waiting`, the engine gets no more of them than it has rows for:
what it has looked at keeps its place.
"""

import asyncio
import contextlib
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from ..decoding.engine import Engine
from ..decoding.prefill import Request
from ..decoding.running_completion import FinishReason, RunningCompletion
from ..decoding.sampling_params import SamplingParams
from ..errors import LenVMError, named
from ..guidance import Control
from ..utils.memory import is_of_memory
from .waiting import PATIENCE, USUAL_TOKENS, WaitingQueue

_MOST_BYTES = 2**31
_MOST_CALLS = 256
_NO_MEMORY = "there is not enough memory"


class QueueFullError(LenVMError):
    """As many completions are under way or wait as there may be: ask again later."""


@dataclass(frozen=True)
class WrittenToken:
    """A token of a completion, as it comes.

    Attributes:
        index: which of the request's completions it is of.
        token_id: -1 where there is none, for an error.
        logprob: (nats) that the generator gave it, before temperature, truncation and control.
        expected: tokens of the whole completion, by the length value model before the first was written; None but at
            the first token, and without such a model or with one of segments.
        remaining: tokens still to come after it.
        finish_reason: of the completion, where this is its last token.
        error: why it failed.
        unread: True = because a model cannot read the prompt: it would fail again.
    """

    index: int
    token_id: int
    logprob: float
    expected: float | None
    remaining: float | None
    finish_reason: FinishReason | None
    error: str | None = None
    unread: bool = False


@dataclass(eq=False)
class Job:
    """A request on its way through the engine.

    Attributes:
        prompt_ids: of the prompt.
        seeds: of its completions.
        params: how tokens are sampled.
        control: of the length; None for the base model.
        inputs: what a model takes for images.
        ends: see `Request`.
        loop: that reads ``tokens``.
        priority: smaller ones start first.
        expected: tokens of all its completions, where that is predicted while it waits.
        predicted: True = it was.
        arrived: see `waiting.Waits`, as ``number``.
        tokens: of all its completions, as they are written; each completion ends with a finish reason.
    """

    prompt_ids: list[int]
    seeds: list[int]
    params: SamplingParams
    control: Control | None
    inputs: dict[str, Any]
    ends: Callable[[list[int]], bool] | None
    loop: asyncio.AbstractEventLoop
    priority: int = 0
    expected: float = USUAL_TOKENS
    predicted: bool = False
    arrived: int = 0
    number: int = 0
    tokens: "asyncio.Queue[WrittenToken]" = field(default_factory=asyncio.Queue)
    left: int = 0
    cancelled: bool = False
    logprobs: dict[int, float] = field(default_factory=lambda: defaultdict(float))

    @property
    def bytes_of_images(self) -> int:
        """What its tensors take until they have been read."""
        return sum(tensor.nbytes for tensor in self.inputs.values())

    def as_request(self) -> Request:
        """As the engine takes it."""

        def ends(ids: list[int]) -> bool:
            return self.cancelled or (self.ends is not None and self.ends(ids))

        return Request(self, self.prompt_ids, self.seeds, self.params, self.control, self.inputs, ends)


class EngineLoop:
    """Runs an engine until it is closed. A context manager.

    Args:
        engine: nobody else uses it.
        most: completions under way and waiting that there are at most.
        most_bytes: of images that wait or are being read; one request may always have its own.
        predict: tokens that requests will take, those of the first few at once; with it the ones that are due first,
            which short ones are soon, start first.
        patience: see `waiting.rank`.
    """

    def __init__(
        self,
        engine: "Engine[Any]",
        most: int,
        most_bytes: int = _MOST_BYTES,
        *,
        predict: Callable[[Sequence[Job]], list[float]] | None = None,
        patience: float = PATIENCE,
    ) -> None:
        self._engine = engine
        self._most, self._most_bytes = most, most_bytes
        self._bytes = 0
        self._changed = threading.Condition()
        self._waiting: WaitingQueue[Job] = WaitingQueue(patience)
        self._predict = predict
        self._reorders = predict is not None  # so the engine must not look at more than it has rows for
        self._begun = 0  # completions that the engine has, in rows or on their way there
        self._steps = 0
        self._running: dict[int, Job] = {}  # by id
        self._calls: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._completions = 0
        self._closing = False
        self.tokens_written = 0
        self._thread = threading.Thread(target=self._run, name="serving", daemon=True)

    def __enter__(self) -> "EngineLoop":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Write what is under way to its end, and take nothing new."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    @property
    def completions(self) -> int:
        """Under way and waiting."""
        return self._completions

    def submit(self, job: Job) -> None:
        """Put a request among those that wait.

        Raises:
            QueueFullError: there are too many, or the server is about to end.
        """
        count = len(job.seeds)
        with self._changed:
            if self._closing:
                raise QueueFullError("the server is about to end")
            if self._completions + count > self._most:
                raise QueueFullError(f"{self._completions} completions are under way or wait, of {self._most} at most")
            if self._bytes and self._bytes + job.bytes_of_images > self._most_bytes:
                raise QueueFullError(f"images of {self._bytes / 2**20:.0f} MiB are waiting already")
            job.left = count
            self._completions += count
            self._bytes += job.bytes_of_images
            self._reorders |= job.priority != 0
            if self._predict is not None:  # until it is read
                job.expected = float(count * job.params.max_tokens)
            self._waiting.add(job, self._steps)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Nobody reads a request any longer: it waits no more, or its rows are freed with their next token."""
        job.cancelled = True
        with self._changed:
            if self._waiting.remove(job):
                self._forget(job)

    def call(self, work: Callable[[], Any]) -> "Future[Any]":
        """Do what needs the models between two steps, in the engine's thread: threads must not share them.

        Raises:
            QueueFullError: too much of that waits already, or the server is about to end.
        """
        done: Future[Any] = Future()
        with self._changed:
            if self._closing:
                raise QueueFullError("the server is about to end")
            if len(self._calls) >= _MOST_CALLS:
                raise QueueFullError(f"{len(self._calls)} texts wait to be read")
            self._calls.append((done, work))
            self._changed.notify()
        return done

    # -- the thread ---

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._calls or self._closing):
                    self._changed.wait()
                if not (self._waiting or self._calls):
                    return
            self._make_call()
            try:
                with contextlib.closing(self._engine.steps(_Arrivals(self))) as steps:
                    for written in steps:
                        self._steps += 1
                        self._tell(written)
                        self._make_call()
                        self._read_waiting()
            except Exception as error:  # such as no memory left: those under way fail, and the next ones are served
                self._fail(error)

    def next_request(self) -> Request | None:
        """The next request that somebody still waits for; None where there is none now."""
        self._read_waiting()
        while True:
            with self._changed:
                if not self._waiting or (self._reorders and self._begun >= self._engine.max_rows):
                    return None
                job = self._waiting.pop(self._steps)
                if not job.cancelled:
                    self._running[id(job)] = job
                    self._begun += job.left
                    return job.as_request()
                self._forget(job)

    def _read_waiting(self) -> None:
        """Predict the lengths of some requests, where more wait than rows are free: a few a step, each once."""
        if self._predict is None:
            return
        with self._changed:
            waiting = self._completions - self._begun
            if waiting <= self._engine.max_rows - self._begun:
                return  # all of them start now
            unread = [job for job in self._waiting if not job.predicted]
        if unread:
            for job, tokens in zip(unread, self._predict(unread), strict=False):
                job.expected, job.predicted = tokens, True

    def _forget(self, job: Job) -> None:
        """Count a job out that never began; with the lock held."""
        self._completions -= job.left
        self._bytes -= job.bytes_of_images
        job.left = 0

    def _make_call(self) -> None:
        """The first call that somebody still waits for: one a step, so that those who write go on."""
        while self._calls:
            done, work = self._calls.popleft()
            if not done.set_running_or_notify_cancel():
                continue
            try:
                done.set_result(work())
            except Exception as error:  # of whoever called, and no reason to end
                done.set_exception(LenVMError(_NO_MEMORY) if is_of_memory(error) else error)
            return

    def _tell(self, written: list[RunningCompletion]) -> None:
        """Count in what a step has written, all of it or, where that fails, nothing."""
        told = [self._told(one) for one in written]
        for job, token in told:
            if token.finish_reason is not None:
                self._count_out(job, 1)
        self._deliver(told)

    def _told(self, one: RunningCompletion) -> tuple[Job, WrittenToken]:
        job: Job = one.request.key
        self.tokens_written += one.last_token >= 0
        logprob, job.logprobs[one.index] = one.logprob - job.logprobs[one.index], one.logprob
        # Taken from the device once a completion, for it is a wait.
        is_first = len(one.token_ids) == 1 and self._engine.counts_to_the_end
        expected = float(one.result.before[one.place]) if one.result is not None and is_first else None
        token = one.last_token
        unread = one.unread is not None
        return job, WrittenToken(
            one.index, token, logprob, expected, one.remaining, one.finish_reason, one.error, unread
        )

    def _count_out(self, job: Job, completions: int) -> None:
        with self._changed:
            job.left -= completions
            self._begun -= completions
            self._completions -= completions
            if not job.left and self._running.pop(id(job), None) is not None:
                self._bytes -= job.bytes_of_images

    def _deliver(self, told: list[tuple[Job, WrittenToken]]) -> None:
        """Once for each event loop, since to wake it costs more than to write a token."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Job, WrittenToken]]] = defaultdict(list)
        for job, token in told:
            by_loop[job.loop].append((job, token))
        for loop, some in by_loop.items():
            with contextlib.suppress(RuntimeError):  # it is closed, and nobody waits
                loop.call_soon_threadsafe(_put, some)

    def _fail(self, error: Exception) -> None:
        reason = _NO_MEMORY if is_of_memory(error) else named(error)
        told = []
        for job in list(self._running.values()):
            told += [(job, WrittenToken(i, -1, 0.0, None, None, "error", reason)) for i in range(len(job.seeds))]
            self._count_out(job, job.left)
        self._deliver(told)


class _Arrivals:
    """The requests that are there now. An iterator that may go on after it has stopped."""

    def __init__(self, loop: EngineLoop) -> None:
        self._loop = loop

    def __iter__(self) -> "_Arrivals":
        return self

    def __next__(self) -> Request:
        request = self._loop.next_request()
        if request is None:
            raise StopIteration
        return request


def _put(told: list[tuple[Job, WrittenToken]]) -> None:
    for job, token in told:
        job.tokens.put_nowait(token)
