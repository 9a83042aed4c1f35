"""Micro-batching: what many requests ask for at about the same time is computed in one call.

A request brings one or more items and a key; items of equal keys may share a batch. One batch runs at a time, in a
thread of its own, so the event loop stays free. When that thread is free, the next batch starts

* at once if it is full, or if one request only is waiting: an idle service adds no delay;
* else when the oldest of the waiting requests has waited for the window.

Everything but `compute` runs on the event loop, so there are no locks.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")
Answer = TypeVar("Answer")


class QueueFullError(RuntimeError):
    """There is no room for the request now; later there may be."""


class ClosingError(RuntimeError):
    """The batcher finishes what it has and takes nothing new."""


class ComputeError(RuntimeError):
    """`compute` failed for the batch that the request was in; the cause is chained."""


class _Request(Generic[Item, Answer]):
    """One call of `submit`. Its items may be spread over several batches."""

    __slots__ = ("answers", "arrived", "future", "items", "left", "taken")

    def __init__(self, items: Sequence[Item], now: float, future: asyncio.Future[list[Answer]]) -> None:
        self.items = items
        self.arrived = now
        self.future = future
        self.answers: list[Answer | None] = [None] * len(items)
        self.taken = 0  # items that a batch has been given
        self.left = len(items)  # items without an answer


_Part = tuple[_Request[Item, Answer], int, int]  # a request, and which of its items are meant


class Batcher(Generic[Key, Item, Answer]):
    """Collects items and runs `compute` on batches of them.

    Args:
        compute: the answers to items that share a key, one each, in order. It runs in one thread, one call at a time.
        max_batch: items in a batch, at most.
        window: seconds that the oldest of several requests waits for more.
        capacity: items that may wait, those in the running batch not counted.
        on_batch: called with the size of each batch.
        on_thread_start: called once in the thread that computes.
    """

    def __init__(
        self,
        compute: Callable[[Key, list[Item]], Sequence[Answer]],
        *,
        max_batch: int,
        window: float,
        capacity: int,
        on_batch: Callable[[int], object] = lambda size: None,
        on_thread_start: Callable[[], object] = lambda: None,
    ) -> None:
        self._compute = compute
        self._max_batch = max_batch
        self._window = window
        self._capacity = capacity
        self._on_batch = on_batch
        self._waiting: dict[Key, deque[_Request[Item, Answer]]] = {}
        self._depth = 0
        self._running = False
        self._closing = False
        self._timer: asyncio.TimerHandle | None = None
        self._idle: asyncio.Future[None] | None = None
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="fastm2rec-model", initializer=on_thread_start)

    @property
    def depth(self) -> int:
        """Items that wait for a batch."""
        return self._depth

    @property
    def closing(self) -> bool:
        return self._closing

    def refuse(self) -> None:
        """Take no new requests from now on. Those that are waiting are still answered."""
        self._closing = True

    async def submit(self, key: Key, items: Sequence[Item]) -> list[Answer]:
        """The answers to `items`. Cancelling the call drops those that no batch has been given yet.

        Raises:
            QueueFullError: fewer places are free than there are items; none was taken.
            ClosingError: after `refuse` or `close`.
            ComputeError: a batch with one of the items failed.
        """
        if self._closing:
            raise ClosingError("the service is shutting down")
        if self._depth + len(items) > self._capacity:
            raise QueueFullError(f"{self._depth} of {self._capacity} places in the queue are taken")
        if not items:
            return []
        loop = asyncio.get_running_loop()
        request: _Request[Item, Answer] = _Request(items, loop.time(), loop.create_future())
        self._waiting.setdefault(key, deque()).append(request)
        self._depth += len(items)
        self._pump()
        try:
            return await request.future
        except asyncio.CancelledError:
            self._drop(key, request)
            raise

    async def close(self) -> None:
        """Refuse new requests, answer those that are waiting, and end the thread."""
        self.refuse()
        self._pump()
        if self._running or self._waiting:
            self._idle = asyncio.get_running_loop().create_future()
            await self._idle
        self._executor.shutdown()

    def _drop(self, key: Key, request: _Request[Item, Answer]) -> None:
        """Forget the items of a request that no batch has been given."""
        if request.taken == len(request.items):
            return
        self._depth -= len(request.items) - request.taken
        request.taken = len(request.items)
        self._waiting[key].remove(request)
        if not self._waiting[key]:
            del self._waiting[key]

    def _drop_cancelled(self) -> None:
        """A cancelled call reaches `submit` one turn of the loop late; no batch is to take its items meanwhile."""
        gone = [(key, one) for key, queue in self._waiting.items() for one in queue if one.future.cancelled()]
        for key, request in gone:
            self._drop(key, request)

    def _pump(self) -> None:
        """Start a batch if it is time for one."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._running:
            return
        self._drop_cancelled()
        if not self._waiting:
            return
        key = min(self._waiting, key=lambda key: self._waiting[key][0].arrived)
        queue = self._waiting[key]
        if len(queue) > 1 and not self._closing and self._size(queue) < self._max_batch:
            loop = asyncio.get_running_loop()
            due = queue[0].arrived + self._window
            if due > loop.time():
                self._timer = loop.call_at(due, self._pump)
                return
        self._start(key)

    def _size(self, queue: deque[_Request[Item, Answer]]) -> int:
        """Items that wait in `queue`; counting stops at a full batch."""
        size = 0
        for request in queue:
            size += len(request.items) - request.taken
            if size >= self._max_batch:
                break
        return size

    def _start(self, key: Key) -> None:
        queue = self._waiting[key]
        items: list[Item] = []
        parts: list[_Part[Item, Answer]] = []
        while queue and len(items) < self._max_batch:
            request = queue[0]
            first = request.taken
            last = min(len(request.items), first + self._max_batch - len(items))
            items += request.items[first:last]
            parts.append((request, first, last))
            request.taken = last
            if last == len(request.items):
                queue.popleft()
        if not queue:
            del self._waiting[key]
        self._depth -= len(items)
        self._running = True
        self._on_batch(len(items))
        running = asyncio.get_running_loop().run_in_executor(self._executor, self._compute, key, items)
        running.add_done_callback(lambda done: self._finish(key, parts, done))

    def _finish(self, key: Key, parts: list[_Part[Item, Answer]], done: asyncio.Future[Sequence[Answer]]) -> None:
        self._running = False
        failure = done.exception()
        answers = [] if failure is not None else list(done.result())
        count = sum(last - first for _, first, last in parts)
        if failure is None and len(answers) != count:
            failure = ValueError(f"compute: expected {count} answers, got {len(answers)}")
        place = 0
        for request, first, last in parts:
            chunk = answers[place : place + last - first]
            place += last - first
            if request.future.done():  # cancelled, or failed in an earlier batch
                continue
            if failure is not None:
                self._drop(key, request)
                error = ComputeError(f"{type(failure).__name__}: {failure}")
                error.__cause__ = failure
                request.future.set_exception(error)
                continue
            request.answers[first:last] = chunk
            request.left -= last - first
            if request.left == 0:
                request.future.set_result(request.answers)  # type: ignore[arg-type]
        self._pump()
        if self._idle is not None and not self._running and not self._waiting:
            self._idle.set_result(None)
            self._idle = None
