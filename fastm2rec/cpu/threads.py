"""Slices of a batch over threads, which the kernels keep busy without Python's lock.

numba's own parallel loops abort when two threads call them at once, or kill a forked child. Here the slices run on the
OpenMP threads of torch, where there are such: after each of torch's own operations these wait for more work without
leaving their cores, for milliseconds, and would take half of a core from any other thread. A forked child has lost
them; there, and where torch has no OpenMP, a pool of Python's does the work. Both may be used from any number of
threads, and the caller works too.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

# So many slices for each thread: rows differ in length, and other work may hold up a core.
SLICES = 4

_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_forked = False

_Entry = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_works: dict[int, Callable[[], None]] = {}
_keys = itertools.count(1)


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


@_Entry
def _enter(key: int) -> None:
    _works[key]()


@functools.cache
def _openmp() -> Callable[..., None] | None:
    """`GOMP_parallel` of the OpenMP library that torch has loaded; LLVM's and Intel's have it as well."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    names = {line.split()[-1] for line in maps.splitlines() if "omp" in line.rpartition("/")[2]}
    folder = str(Path(torch.__file__).parent)
    for name in sorted(names, key=lambda name: not name.startswith(folder)):
        try:
            parallel = ctypes.CDLL(name).GOMP_parallel
        except (OSError, AttributeError):
            continue
        parallel.argtypes = [_Entry, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        parallel.restype = None
        return parallel
    return None


def _together(work: Callable[[], None], threads: int) -> None:
    """Call `work`, which must not raise, on each of `threads` threads; returns when all have returned."""
    parallel = None if _forked else _openmp()
    if parallel is None:
        helpers = [_executor().submit(work) for _ in range(threads - 1)]
        work()
        for helper in helpers:
            if not helper.cancel():
                helper.result()
        return
    key = next(_keys)
    _works[key] = work
    try:
        parallel(_enter, key, threads, 0)
    finally:
        del _works[key]


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
    failures: list[BaseException] = []

    def work() -> None:
        while True:
            try:
                first = slices.popleft()
            except IndexError:
                return
            try:
                task(first, min(first + size, count))
            except BaseException as failure:
                failures.append(failure)
                slices.clear()

    _together(work, min(threads, len(slices)))
    if failures:
        raise failures[0]
