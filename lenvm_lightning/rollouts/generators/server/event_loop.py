"""Many requests under way at once, for callers that have no event loop, or have one."""

import asyncio
import contextlib
import itertools
import queue
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Generic, TypeVar

import openai

Job = TypeVar("Job")
Result = TypeVar("Result")
Work = Callable[[openai.AsyncOpenAI, Job], Awaitable[Result]]


class EventLoopThread(Generic[Job, Result]):
    """Works on jobs side by side, on an event loop in a thread of its own; used once.

    Jobs are taken, and images of their prompts opened, in the caller's thread: whatever they come from need not know of
    threads.

    Args:
        jobs: read as there is room for them; no more than twice ``concurrency`` are ahead of the results taken.
        concurrency: jobs worked on at once.
        open_client: makes the client that all of them share; called in the thread.
        work: does one job.
    """

    def __init__(
        self,
        jobs: Iterator[Job],
        concurrency: int,
        open_client: Callable[[], openai.AsyncOpenAI],
        work: "Work[Job, Result]",
    ) -> None:
        self._jobs, self._concurrency = jobs, concurrency
        self._open_client, self._work = open_client, work
        self._results: queue.SimpleQueue[tuple[Result] | None] = queue.SimpleQueue()  # None: no more will come
        self._error: BaseException | None = None
        self._started = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._main_task: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._run_loop, name="server-generator", daemon=True)

    # -- in the caller's thread ---------------------------------------------------------------------------------------

    def results(self) -> Iterator[Result]:
        """Yield results as they come until all are there, then raise what went wrong, if anything.

        Closing the iterator, or an interrupt, abandons the jobs under way.
        """
        self._thread.start()
        self._started.wait()
        try:
            under_way = 0
            while True:
                for job in itertools.islice(self._jobs, 2 * self._concurrency - under_way):
                    under_way += 1
                    self._call_in_loop(self._todo.put_nowait, job)
                if not under_way or (result := self._results.get()) is None:
                    break
                under_way -= 1
                yield result[0]
        finally:
            self._call_in_loop(lambda: self._main_task and self._main_task.cancel())
            self._thread.join()
        if self._error is not None:
            raise self._error

    def _call_in_loop(self, function: Callable[..., Any], *arguments: Any) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: what went wrong is about to be raised
                self._loop.call_soon_threadsafe(function, *arguments)

    # -- in the thread of the loop ------------------------------------------------------------------------------------

    def _run_loop(self) -> None:
        try:
            asyncio.run(self._run_workers())
        except asyncio.CancelledError:
            pass
        except BaseExceptionGroup as group:
            self._error = group.exceptions[0]
        except BaseException as error:
            self._error = error
        finally:
            self._results.put(None)
            self._started.set()

    async def _run_workers(self) -> None:
        self._todo: asyncio.Queue[Job] = asyncio.Queue()
        self._main_task, self._loop = asyncio.current_task(), asyncio.get_running_loop()
        self._started.set()
        async with self._open_client() as client, asyncio.TaskGroup() as workers:
            for _ in range(self._concurrency):
                workers.create_task(self._worker(client))

    async def _worker(self, client: openai.AsyncOpenAI) -> None:
        while True:
            job = await self._todo.get()
            self._results.put((await self._work(client, job),))
