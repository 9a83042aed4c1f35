"""How long the GPU works on a call, without the time that the host takes to launch it.

Before each call the GPU is given a gigabyte to fill, so that the cache holds nothing of its inputs, and then it waits
for some two milliseconds. Meanwhile the host queues the call. A call that takes the host longer than that, such as a
loop of thousands of launches, is timed with the gaps that it leaves.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from bench import _failure, _timing
from bench.peers._problem import INPUTS

FILL_BYTES = 1 << 30
HEAD_START_CYCLES = 4_000_000  # 2 ms at 2 GHz; filling alone is 0.3 ms, less than an eager model's launches take
WARM_UP = INPUTS  # cuFFT's callbacks are compiled for each of them


def interleave(
    calls: Sequence[_timing.Call], device: torch.device, seconds: float, least: int = 5, most: int = 50
) -> list[_timing.Timing | str]:
    """Time `calls` in turn, round after round; the arguments are those of `_timing.interleave`."""
    room = torch.empty(FILL_BYTES, dtype=torch.uint8, device=device)
    _timing.wake(device)
    failures = _timing.Failures(device, len(calls))
    for index, call in enumerate(calls):
        failures.of(index, _warm_up, call, device)
    samples: list[list[float]] = [[] for _ in calls]
    start = time.perf_counter()
    for turn in range(most):
        events = [failures.of(index, _launch, call, room, turn) for index, call in enumerate(calls)]
        if not failures.lost:
            # What a launch left behind surfaces here, nobody's: the warm-up has found what fails at once.
            failures.lost = _failure.is_lost(device)
        if failures.lost:
            break
        for own, pair in zip(samples, events, strict=True):
            if pair is not None:
                own.append(pair[0].elapsed_time(pair[1]) * 1e-3)
        if turn + 1 >= least and time.perf_counter() - start > seconds:
            break
    return failures.results([_timing.summarise(own) if len(own) >= least else None for own in samples])


def _warm_up(call: _timing.Call, device: torch.device) -> None:
    for turn in range(WARM_UP):
        call(turn)
    torch.cuda.synchronize(device)


def _launch(call: _timing.Call, room: torch.Tensor, turn: int) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    """The events around a call behind the filling of `room`."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    room.zero_()
    if hasattr(torch.cuda, "_sleep"):
        torch.cuda._sleep(HEAD_START_CYCLES)
    begin.record()
    call(turn)
    end.record()
    return begin, end
