"""What every script does: for each shape check what is to be measured, measure what passed, write the rows.

A `Job` is a row that can be made into a call. What raises, runs out of memory or computes something else than its
reference becomes a row that says so, and the others go on.

All times of a shape come from one run of interleaved rounds, after the last of its jobs was compiled. Compiling may
take longer than a process has: what needs none is measured and written before, and replaced when the shape is done.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from . import _bounds, _failure, _memory, _timing
from ._options import DTYPES
from ._results import Row, Writer, device_name, result_path, row_label

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
        limit: when the process will be ended, which makes what comes first worth more than something of everything;
            None for `seconds`.
    """

    def __init__(self, seconds: float, shapes: int, limit: float | None = None) -> None:
        self._seconds = seconds
        self._limit = seconds if limit is None else limit
        self._reserve = limit is None
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

    def may_compile(self, first: bool = False) -> bool:
        """Would there be time for the shapes that wait, if one more row were compiled?

        The first row of a shape, the peer of all ratios, does not wait for other shapes where a limit is given.
        """
        waiting = self._waiting if self._reserve or not first else 0
        return self.until_limit() - self.compile_seconds >= SHAPE_SECONDS * waiting


def checked(jobs: Sequence[Job], budget: Budget, device: torch.device) -> list[tuple[Job, _timing.Call]]:
    """The jobs whose call computes what it should, with their calls; the rows of the others say what is wrong.

    Raises:
        LostError: one of them took the GPU with it, as its row says.
    """
    ready: list[tuple[Job, _timing.Call]] = []
    first = next((job for job in jobs if job.is_late and job.prepare), None)
    for job in jobs:
        row = job.row
        if job.prepare is None:
            assert row.skipped is not None
            continue
        if job.is_late and not budget.may_compile(job is first):
            row.skipped = f"not compiled: {budget.label}"
            continue
        begun = time.perf_counter()
        try:
            call, row.max_rel_err = job.prepare()
        except Exception as error:
            _fail(row, error, device)
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
    """Time what is ready, in turn, and fill in the rows.

    Raises:
        LostError: as `checked`.
    """
    timings = _timing.interleave([call for _, call in ready], device, seconds, LEAST_ROUNDS) if ready else []
    lost = any(isinstance(timing, str) and _failure.concerns(timing) for timing in timings)
    for (job, call), timing in zip(ready, timings, strict=True):
        row = job.row
        if isinstance(timing, str):
            if timing != _failure.WAITING:
                _forget(row)
                row.skipped = timing
            continue
        row.median_ms, row.p20_ms, row.p80_ms = timing.median_ms, timing.p20_ms, timing.p80_ms
        row.cpu_ms = timing.cpu_ms
        row.sequences_per_s = row.batch / timing.median_ms * 1e3
        if job.work is not None:
            row.bound, row.bound_ms = ceilings.bound(job.work)
            row.bound_share = row.bound_ms / timing.median_ms
        # A graph, also one that torch.compile made, has taken its memory before.
        if device.type == "cuda" and not lost and "graph" not in row.mode and "compiled" not in row.mode:
            fill_memory(job, call, device)
    if lost:
        raise _failure.LostError


def fill_memory(job: Job, call: _timing.Call, device: torch.device) -> None:
    """Measure the peak of a call that has run before, and fill in the row.

    Raises:
        LostError: as `checked`.
    """
    try:
        job.row.peak_mem_mb = _memory.peak_mb(call, device)
    except Exception as error:
        _fail(job.row, error, device)


def _fail(row: Row, error: Exception, device: torch.device) -> None:
    """Say so in the row."""
    row.skipped = _failure.told(error, device)
    if _failure.concerns(row.skipped):
        raise _failure.LostError from error


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
            said = _failure.told(error, device)
            writer.add([dataclasses.replace(row, skipped=said) for row in empty(shape)])
            if _failure.concerns(said):
                _failure.end()
            continue
        late = [job for job in jobs if job.is_late]
        try:
            ready = checked([job for job in jobs if not job.is_late], budget, device)
            if any(job.prepare for job in late) and budget.may_compile(first=True):
                fill(ready, min(seconds, PREVIEW_SECONDS), shape.dtype)
                waiting = {id(job.row): budget.compiling for job in late if job.prepare}
                rows = (job.row for job in jobs)
                writer.preview([dataclasses.replace(row, skipped=waiting.get(id(row), row.skipped)) for row in rows])
                ready = [one for one in ready if one[0].row.skipped is None]
            ready += checked(late, budget, device)
            fill(ready, seconds, shape.dtype)
        except _failure.LostError:
            for job in jobs:
                if job.row.skipped is None and not has_value(job.row):
                    job.row.skipped = _failure.WAITING
            writer.add([job.row for job in jobs])
            _failure.end()
        writer.add([job.row for job in jobs])
        del jobs, late, ready
        _release(compiled=True)
    print(f"rows: {writer.path}", file=sys.stderr)
    return writer.rows


def _forget(row: Row) -> None:
    """Take back what was measured before the row failed."""
    row.median_ms = row.p20_ms = row.p80_ms = row.cpu_ms = row.sequences_per_s = row.peak_mem_mb = None
    row.bound = row.bound_ms = row.bound_share = None


def has_value(row: Row) -> bool:
    """Was anything measured?"""
    return row.median_ms is not None or row.peak_mem_mb is not None


def _wanted(row: Row, options: argparse.Namespace) -> bool:
    if row_label(row) in (options.leave_out or ()):
        return False
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
        with contextlib.suppress(RuntimeError):  # of a lost GPU, which the next call finds
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
