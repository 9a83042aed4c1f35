"""A kernel over the slices of a batch, on as many threads as torch has.

numba's own parallel loops abort when two threads call them at once, or kill a forked child. Here the slices run on the
OpenMP threads of torch, where there are such (`slices.py`). A forked child has lost them; there, and where torch has no
OpenMP, a pool of Python's does the work. Both may be used from any number of threads, and the caller works too.
"""

from __future__ import annotations

import functools
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from .arrays import scratch

# So many slices for each thread: rows differ in length, and other work may hold up a core.
SLICES = 4
LINE = 16  # elements, at least a cache line: no thread writes to another's

_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_forked = False


def _executor() -> ThreadPoolExecutor:
    global _pool
    with _lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="fastm2rec")
        return _pool


def _forget() -> None:
    """A fork copies neither the threads nor whoever holds the lock."""
    global _pool, _lock, _forked
    _pool, _lock, _forked = None, threading.Lock(), True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def whole_lines(size: int) -> int:
    """As many elements, and as many more as keep two threads' scratch apart."""
    return -(-size // LINE) * LINE


def has_openmp() -> bool:
    """May kernels start threads themselves?"""
    from .slices import openmp

    return openmp() and not _forked


def run(kernel: Any, arguments: tuple[Any, ...], count: int, grain: int, size: int, dtype: torch.dtype) -> None:
    """Call a kernel that `slices` has made for 0..count, on up to torch.get_num_threads() threads.

    Args:
        kernel: takes a `Schedule`, and then the arguments.
        arguments: arrays, numbers, and named tuples of these.
        count: what is sliced, rows of the batch for instance.
        grain: as much as is worth a slice.
        size: elements of scratch that a thread needs.
        dtype: of the scratch.
    """
    if count == 0:
        return
    threads = torch.get_num_threads()
    step = max(grain, -(-count // (SLICES * threads)))
    threads = min(threads, -(-count // step))
    size = whole_lines(size)
    if threads == 1:
        with scratch(size, dtype) as memory:
            kernel(np.zeros(2, np.int64), memory, size, count, step, 1, *arguments)
        return
    from .slices import Schedule

    native = has_openmp()
    with scratch(threads * size, dtype) as memory:
        schedule = Schedule(np.zeros(2, np.int64), memory, size, count, step, threads if native else 1)
        call = functools.partial(kernel, *schedule, *arguments)
        helpers = [] if native else [_executor().submit(call) for _ in range(threads - 1)]
        call()
        for helper in helpers:
            if not helper.cancel():
                helper.result()
