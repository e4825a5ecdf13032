"""Several engines at once, each in a thread with CPU cores of its own.

The products of a decode step are small: two cores on one of them wait for each other most of the time, and other work
on one of the cores delays both. Two engines with half of the rows each do not wait. Their threads share the
interpreter, so this is for models whose steps are mostly spent in products.
"""

import contextlib
import itertools
import queue
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from .engine import Engine
from .running_completion import RunningCompletion

Passed = TypeVar("Passed")
_END = object()


@dataclass(frozen=True)
class Written:
    """What a step of one engine came to.

    Attributes:
        tokens: that it has written.
        ended: completions that ended with it.
    """

    tokens: int
    ended: list[RunningCompletion]


def written(engines: Sequence[Engine[Passed]], requests: Iterator[Any]) -> Iterator[Written | Passed]:
    """Yield what each step of each engine has written; what is no request is passed on.

    Requests go to the engines in turn, so that the same requests give each engine the same ones.

    Args:
        engines: with rows of their own, the models shared.
        requests: see `Engine.steps`; read by the threads of the engines, one at a time.
    """
    if len(engines) == 1:
        yield from map(_told, engines[0].steps(requests))
        return
    dealt = _Dealt(requests, len(engines))
    found: queue.SimpleQueue[Any] = queue.SimpleQueue()
    stop = threading.Event()

    def work(engine: Engine[Passed], own: Iterator[Any]) -> None:
        try:
            with contextlib.closing(engine.steps(own)) as steps:
                for item in steps:
                    if stop.is_set():
                        return
                    found.put(_told(item))
        except BaseException as error:  # raised again where the others are waited for
            found.put(_Failed(error))
        finally:
            found.put(_END)

    with _threads_each(len(engines)):
        threads = [
            threading.Thread(target=work, args=(engine, dealt.to(place)), name=f"engine {place}", daemon=True)
            for place, engine in enumerate(engines)
        ]
        for thread in threads:
            thread.start()
        try:
            running = len(threads)
            while running:
                item = found.get()
                if item is _END:
                    running -= 1
                elif isinstance(item, _Failed):
                    raise item.error
                else:
                    yield item
        finally:
            stop.set()
            for thread in threads:
                thread.join()


@dataclass(frozen=True)
class _Failed:
    error: BaseException


def _told(item: Any) -> Any:
    """A step as it will not change any more: completions that are being written do."""
    if not isinstance(item, list):
        return item
    return Written(len(item), [completion for completion in item if completion.finish_reason])


class _Dealt(Generic[Passed]):
    """Items of one iterator for several readers, in turn, each read when somebody needs it."""

    def __init__(self, items: Iterator[Passed], readers: int) -> None:
        self._items = items
        self._lock = threading.Lock()
        self._waiting: list[deque[Passed]] = [deque() for _ in range(readers)]
        self._next = itertools.cycle(range(readers))

    def to(self, reader: int) -> Iterator[Passed]:
        """The items of one reader."""
        while True:
            with self._lock:
                while not self._waiting[reader]:
                    item = next(self._items, _END)
                    if item is _END:
                        return
                    self._waiting[next(self._next)].append(item)  # type: ignore[arg-type]
                mine = self._waiting[reader].popleft()
            yield mine


@contextlib.contextmanager
def _threads_each(engines: int) -> Iterator[None]:
    """Share the threads of this process out; new threads take what is set here."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // engines))
    try:
        yield
    finally:
        torch.set_num_threads(before)
