"""How long a call takes, beside others: interleaved rounds in one process, so that a ratio survives a noisy machine.

On a CPU a sample is the wall time of as many calls as fill a few milliseconds, and the processor time that all threads
of the process spent on them, which other work on the machine disturbs less. On CUDA it is the time between two events
around one call, after a warm-up. Inputs are rotated, so that no result is that of the call before; a GPU's cache may
hold all of them, as that of an H200, of 50 MB, does with a few batches of ids.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from . import _failure

Result = TypeVar("Result")
Call = Callable[[int], object]  # called with the number of the sample, to pick its inputs

CPU_SAMPLE_SECONDS = 0.01
WAKE_SECONDS = 0.3  # of work before the rounds of a GPU, whose clocks fall while the host checks and compiles
WAKE_SIZE = 4096
SLOW_SECONDS = 0.1  # a call that takes longer on a CPU is warm after one, and is a sample of its own


@dataclass(frozen=True)
class Timing:
    """Quantiles of the samples, in milliseconds; `cpu_ms` is the median processor time, None on CUDA."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    samples: int
    cpu_ms: float | None = None


def interleave(
    calls: Sequence[Call], device: torch.device, seconds: float, least: int = 5, most: int = 50
) -> list[Timing | str]:
    """Time `calls` in turn, round after round.

    Args:
        calls: what to time; every one is warmed up first.
        device: where they run.
        seconds: stop after the round that passes this, all calls together.
        least, most: rounds, whatever `seconds` says.

    Returns:
        For each call its times, or the reason why it has none: it raised, and the others went on. Where it took the
        GPU with it they cannot: each has the times of its samples so far if they are `least`, or else it waits.
    """
    wake(device)
    failures = Failures(device, len(calls))
    repeats = [failures.of(index, _repeats, call, device) or 0 for index, call in enumerate(calls)]
    samples: list[list[tuple[float, float]]] = [[] for _ in calls]
    start = time.perf_counter()
    for turn in range(most):
        for index, (own, call, repeat) in enumerate(zip(samples, calls, repeats, strict=True)):
            sample = failures.of(index, _sample, call, device, turn, repeat)
            if sample is not None:
                own.append(sample)
        if failures.lost or (turn + 1 >= least and time.perf_counter() - start > seconds):
            break
    return failures.results([_of_both(own, device) if len(own) >= least else None for own in samples])


def wake(device: torch.device) -> None:
    """Let a GPU multiply matrices until its clocks are up. It may be lost, which the calls will say."""
    if device.type != "cuda":
        return
    with contextlib.suppress(RuntimeError):
        a = torch.zeros(WAKE_SIZE, WAKE_SIZE, dtype=torch.bfloat16, device=device)
        start = time.perf_counter()
        while time.perf_counter() - start < WAKE_SECONDS:
            a @ a
            torch.cuda.synchronize(device)


class Failures:
    """What calls raised: one that did is not called again, and none is once the GPU is lost."""

    def __init__(self, device: torch.device, calls: int) -> None:
        self.lost = False
        self._device = device
        self._failures: list[str | None] = [None] * calls

    def of(self, index: int, function: Callable[..., Result], *arguments: Any) -> Result | None:
        """`function(*arguments)` for the call of this index; None where it failed, now or before."""
        if self.lost or self._failures[index] is not None:
            return None
        try:
            return function(*arguments)
        except Exception as error:
            said = _failure.told(error, self._device)
            self._failures[index] = said
            self.lost = _failure.concerns(said)
            return None

    def results(self, timings: Sequence[Timing | None]) -> list[Timing | str]:
        """Each call's failure, or its timing."""
        return [failure or timing or _failure.WAITING for failure, timing in zip(self._failures, timings, strict=True)]


def summarise(samples: Sequence[float]) -> Timing:
    """Quantiles of samples in seconds."""
    values = torch.tensor(samples, dtype=torch.float64) * 1e3
    p20, median, p80 = values.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return Timing(median, p20, p80, len(samples))


def _of_both(samples: Sequence[tuple[float, float]], device: torch.device) -> Timing:
    timing = summarise([wall for wall, _ in samples])
    if device.type == "cuda":
        return timing
    return replace(timing, cpu_ms=summarise([processor for _, processor in samples]).median_ms)


def _repeats(call: Call, device: torch.device) -> int:
    """Warm up, and count how many calls make a sample."""
    if device.type == "cuda":
        for turn in range(5):
            call(turn)
        torch.cuda.synchronize(device)
        return 1
    seconds = 0.0
    for turn in range(3):
        start = time.perf_counter()
        call(turn)
        seconds = time.perf_counter() - start
        if seconds > SLOW_SECONDS:
            return 1
    return max(1, round(CPU_SAMPLE_SECONDS / max(seconds, 1e-9)))


def _sample(call: Call, device: torch.device, turn: int, repeat: int) -> tuple[float, float]:
    """Seconds of a call: on the clock, and of the processors (0 on CUDA)."""
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call(turn)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3, 0.0
    start, processor = time.perf_counter(), time.process_time()
    for _ in range(repeat):
        call(turn)
    return (time.perf_counter() - start) / repeat, (time.process_time() - processor) / repeat
