"""How long a call takes, beside others: interleaved rounds in one process, so that a ratio survives a noisy machine.

On a CPU a sample is the wall time of as many calls as fill a few milliseconds; on CUDA it is the time between two
events around one call, after a warm-up, with the inputs rotated so that none of them waits in the cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[int], object]  # called with the number of the sample, to pick its inputs

CPU_SAMPLE_SECONDS = 0.01


@dataclass(frozen=True)
class Timing:
    """Quantiles of the samples, in milliseconds."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    samples: int


def interleave(
    calls: Sequence[Call], device: torch.device, seconds: float, least: int = 5, most: int = 50
) -> list[Timing]:
    """Time `calls` in turn, round after round.

    Args:
        calls: what to time; every one is warmed up first.
        device: where they run.
        seconds: stop after the round that passes this, all calls together.
        least, most: rounds, whatever `seconds` says.
    """
    repeats = [_repeats(call, device) for call in calls]
    samples: list[list[float]] = [[] for _ in calls]
    start = time.perf_counter()
    for turn in range(most):
        for own, call, repeat in zip(samples, calls, repeats, strict=True):
            own.append(_sample(call, device, turn, repeat))
        if turn + 1 >= least and time.perf_counter() - start > seconds:
            break
    return [summarise(own) for own in samples]


def summarise(samples: Sequence[float]) -> Timing:
    """Quantiles of samples in seconds."""
    values = torch.tensor(samples, dtype=torch.float64) * 1e3
    p20, median, p80 = values.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return Timing(median, p20, p80, len(samples))


def _repeats(call: Call, device: torch.device) -> int:
    """Warm up, and count how many calls make a sample."""
    for turn in range(2 if device.type == "cpu" else 5):
        call(turn)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return 1
    start = time.perf_counter()
    call(0)
    return max(1, round(CPU_SAMPLE_SECONDS / max(time.perf_counter() - start, 1e-9)))


def _sample(call: Call, device: torch.device, turn: int, repeat: int) -> float:
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call(turn)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3
    start = time.perf_counter()
    for _ in range(repeat):
        call(turn)
    return (time.perf_counter() - start) / repeat


def peak_memory_mb(call: Call, device: torch.device) -> float | None:
    """The most memory that a call holds on a CUDA device, in units of 2^20 bytes; None on a CPU, which counts none."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    call(0)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) / 2**20
