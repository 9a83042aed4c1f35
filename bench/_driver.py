"""What every script does: for each shape check what is to be measured, measure what passed, write the rows.

A `Job` is a row that can be made into a call. What raises, runs out of memory or computes something else than its
reference becomes a row that says so, and the others go on.

All times of a shape come from one run of interleaved rounds, after the last of its jobs was compiled. Compiling may
take longer than a process has: what needs none is measured and written before, and replaced when the shape is done.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from . import _bounds, _memory, _timing
from ._options import DTYPES
from ._results import Row, Writer, device_name, result_path

LEAST_ROUNDS = 3
MEASURE_SHARE = 0.35  # of a shape's time goes to rounds of measurement; the rest is building, checking and compiling
PREVIEW_SECONDS = 2.0  # of the rounds before the first job is compiled
COMPILE_SECONDS = 20.0  # what compiling is taken to need before one has been seen
SHAPE_SECONDS = 8.0  # what is kept for each shape that waits, and not spent on compiling


@dataclass(frozen=True)
class Shape:
    """What one group of rows is measured at; all of them are timed in turn."""

    dtype: str
    seq_len: int
    batch: int
    n_items: int

    def __str__(self) -> str:
        return f"{self.dtype}, length {self.seq_len}, batch {self.batch}, {self.n_items:,} items"


@dataclass
class Job:
    """One row and how to fill it.

    Args:
        row: names and sizes; with `skipped` set where there is nothing to run.
        prepare: returns the call that is measured, and how far what it computes is from its reference. None where
            the row is skipped.
        tolerance: the largest error that gets a time.
        work: what the bound is computed from.
        is_late: it is slow to prepare, so others go first, and it is left out when time is short.
    """

    row: Row
    prepare: Callable[[], tuple[_timing.Call, float]] | None = None
    tolerance: float = 0.0
    work: _bounds.Work | None = None
    is_late: bool = False


JobMaker = Callable[[Shape], Sequence[Job]]


class Budget:
    """Seconds, and how they are shared out among shapes. The first shape always runs.

    Args:
        seconds: no shape is begun after them.
        shapes: how many there are.
        limit: when the process will be ended; None for `seconds`.
    """

    def __init__(self, seconds: float, shapes: int, limit: float | None = None) -> None:
        self._seconds = seconds
        self._limit = seconds if limit is None else limit
        self._start = time.perf_counter()
        self._waiting = shapes
        self._first = True
        self.compile_seconds = COMPILE_SECONDS
        self.label = f"the time budget ran out (--budget-seconds {seconds:g})"
        self.compiling = f"not compiled: the process ended before it was (--budget-seconds {seconds:g})"

    def left(self) -> float:
        return self._seconds - (time.perf_counter() - self._start)

    def until_limit(self) -> float:
        """Seconds until the process will be ended, at least 0."""
        return max(0.0, self._limit - (time.perf_counter() - self._start))

    def begin(self) -> float | None:
        """Seconds for the rounds of the next shape; None where there is no time for it."""
        seconds = MEASURE_SHARE * max(0.0, self.left()) / self._waiting
        self._waiting -= 1
        if not self._first and self.left() <= 0:
            return None
        self._first = False
        return seconds

    def may_compile(self) -> bool:
        """Would there be time for the shapes that wait, if one more row were compiled?"""
        return self.until_limit() - self.compile_seconds >= SHAPE_SECONDS * self._waiting


class _Guarded:
    """A call that fails once and is silent afterwards, so that the others of its round go on."""

    def __init__(self, call: _timing.Call) -> None:
        self._call = call
        self.failure: str | None = None

    def __call__(self, turn: int) -> None:
        if self.failure is None:
            try:
                self._call(turn)
            except Exception as error:
                self.failure = reason(error)


def reason(error: BaseException) -> str:
    """An exception in a line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def checked(jobs: Sequence[Job], budget: Budget) -> list[tuple[Job, _timing.Call]]:
    """The jobs whose call computes what it should, with their calls; the rows of the others say what is wrong."""
    ready: list[tuple[Job, _timing.Call]] = []
    for job in jobs:
        row = job.row
        if job.prepare is None:
            assert row.skipped is not None
            continue
        if job.is_late and not budget.may_compile():
            row.skipped = f"not compiled: {budget.label}"
            continue
        begun = time.perf_counter()
        try:
            call, row.max_rel_err = job.prepare()
        except Exception as error:
            row.skipped = reason(error)
            _release()
            continue
        if job.is_late:
            budget.compile_seconds = time.perf_counter() - begun
        if not row.max_rel_err <= job.tolerance:
            row.skipped = f"wrong: differs from its reference by {row.max_rel_err:.1e}"
            continue
        ready.append((job, call))
    return ready


def fill_times(
    ready: Sequence[tuple[Job, _timing.Call]], device: torch.device, ceilings: _bounds.Ceilings, seconds: float
) -> None:
    """Time what is ready, in turn, and fill in the rows."""
    guarded = [_Guarded(call) for _, call in ready]
    timings = _timing.interleave(guarded, device, seconds, LEAST_ROUNDS) if ready else []
    for (job, _), guard, timing in zip(ready, guarded, timings, strict=True):
        row = job.row
        if guard.failure is not None:
            row.skipped = guard.failure
            continue
        row.median_ms, row.p20_ms, row.p80_ms = timing.median_ms, timing.p20_ms, timing.p80_ms
        row.cpu_ms = timing.cpu_ms
        row.sequences_per_s = row.batch / timing.median_ms * 1e3
        if job.work is not None:
            row.bound, row.bound_ms = ceilings.bound(job.work)
            row.bound_share = row.bound_ms / timing.median_ms
        # A graph, also one that torch.compile made, has taken its memory before.
        if device.type == "cuda" and "graph" not in row.mode and "compiled" not in row.mode:
            fill_memory(job, guard, device)


def fill_memory(job: Job, call: _timing.Call, device: torch.device) -> None:
    """Measure the peak of a call that has run before, and fill in the row."""
    guard = _Guarded(call)
    peak = _memory.peak_mb(guard, device)
    if guard.failure is None:
        job.row.peak_mem_mb = peak
    else:
        job.row.skipped = guard.failure


def sweep(
    options: argparse.Namespace,
    script: str,
    shapes: Sequence[Shape],
    make: JobMaker,
    empty: Callable[[Shape], Sequence[Row]],
    only_memory: bool = False,
) -> list[Row]:
    """Measure every shape, write each one's rows as soon as they exist, and return all of them.

    Args:
        options: as `_options.parse` gives them.
        script: its name, which is the record's too.
        shapes: in the order of their worth.
        make: the jobs of a shape.
        empty: rows for a shape that is not begun, or that fails while it is built.
        only_memory: measure peaks, not times.
    """
    device = torch.device(options.device)
    writer = Writer(result_path(script, device, options.out, options.record), device, script)
    budget = Budget(options.budget_seconds, len(shapes), options.limit_seconds)

    def fill(ready: Sequence[tuple[Job, _timing.Call]], seconds: float, dtype: str) -> None:
        if only_memory:
            for job, call in ready:
                fill_memory(job, call, device)
        else:
            fill_times(ready, device, ceilings[dtype], min(seconds, budget.until_limit()))

    ceilings: dict[str, _bounds.Ceilings] = {}
    if only_memory and device.type == "cpu":
        _memory.no_reuse()
    for shape in shapes:
        seconds = budget.begin()
        if seconds is None:
            writer.add([dataclasses.replace(row, skipped=budget.label) for row in empty(shape)])
            continue
        print(f"  {shape} ...", file=sys.stderr, flush=True)
        torch.manual_seed(0)
        try:
            jobs = [job for job in make(shape) if _wanted(job.row, options)]
            if not only_memory and shape.dtype not in ceilings:
                ceilings[shape.dtype] = _bounds.measure_ceilings(device, DTYPES[shape.dtype])
        except Exception as error:
            writer.add([dataclasses.replace(row, skipped=reason(error)) for row in empty(shape)])
            continue
        ready = checked([job for job in jobs if not job.is_late], budget)
        late = [job for job in jobs if job.is_late]
        if any(job.prepare for job in late) and budget.may_compile():
            fill(ready, min(seconds, PREVIEW_SECONDS), shape.dtype)
            waiting = {id(job.row): budget.compiling for job in late if job.prepare}
            rows = (job.row for job in jobs)
            writer.preview([dataclasses.replace(row, skipped=waiting.get(id(row), row.skipped)) for row in rows])
            ready = [one for one in ready if one[0].row.skipped is None]
        ready += checked(late, budget)
        fill(ready, seconds, shape.dtype)
        writer.add([job.row for job in jobs])
        del jobs, ready
        _release(compiled=True)
    print(f"rows: {writer.path}", file=sys.stderr)
    return writer.rows


def _wanted(row: Row, options: argparse.Namespace) -> bool:
    if options.eager_only and ("compiled" in row.mode or "graph" in row.mode):
        return False
    if options.compile is not None and "compiled" in row.mode and row.impl not in options.compile:
        return False
    return options.impls is None or row.impl in options.impls


def _release(compiled: bool = False) -> None:
    """Give back what the last shape, or a call that failed, still holds."""
    if compiled:
        torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def grid(options: argparse.Namespace) -> Iterator[Shape]:
    """Every dtype at every length and batch size; a shape's dtypes are neighbours, so that they meet the same noise."""
    for seqlen in options.seq_len:
        for batch in options.batch:
            for dtype in options.dtype:
                yield Shape(dtype, seqlen, batch, options.n_items)


def header(options: argparse.Namespace, what: str) -> str:
    """A line that says what is measured, and on what."""
    name = device_name(torch.device(options.device))
    return f"{what}; {name}; torch {torch.__version__}; N={options.d_state}"
