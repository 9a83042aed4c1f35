"""Slices of a batch over a pool of threads, which the kernels keep busy without Python's lock.

numba's own parallel loops abort when two threads call them at once, or kill a forked child. This pool may be used from
any number of threads, and a forked child makes its own. The caller works too, so a call never waits for a free thread.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

# So many slices for each thread: rows differ in length, and other work may hold up a core.
SLICES = 4

_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None


def _executor() -> ThreadPoolExecutor:
    global _pool
    with _lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="fastm2rec")
        return _pool


def _forget() -> None:
    """A fork copies neither the threads nor whoever holds the lock."""
    global _pool, _lock
    _pool, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def run(task: Callable[[int, int], None], count: int, grain: int) -> None:
    """Call `task(first, last)` for slices of 0..count, at least `grain` long, on up to torch.get_num_threads() threads.

    Raises what a task raised, when no task runs any more.
    """
    threads = torch.get_num_threads()
    size = max(grain, -(-count // (SLICES * threads)))
    if threads == 1 or count <= size:
        task(0, count)
        return
    slices = deque(range(0, count, size))

    def work() -> None:
        while True:
            try:
                first = slices.popleft()
            except IndexError:
                return
            task(first, min(first + size, count))

    helpers = [_executor().submit(work) for _ in range(min(threads, len(slices)) - 1)]
    try:
        work()
    finally:
        slices.clear()
        failures = [helper.exception() for helper in helpers if not helper.cancel()]
    for failure in failures:
        if failure is not None:
            raise failure
