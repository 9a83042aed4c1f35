"""How long the GPU works on a call, without the time that the host takes to launch it.

Before each call the GPU is given a gigabyte to fill. While it does that, the host queues the call, and the cache holds
nothing of its inputs. A call that takes the host longer than that, such as a loop of thousands of launches, is timed
with the gaps that it leaves.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from bench import _timing

FILL_BYTES = 1 << 30
WARM_UP = 3


def interleave(
    calls: Sequence[_timing.Call], device: torch.device, seconds: float, least: int = 5, most: int = 50
) -> list[_timing.Timing]:
    """Time `calls` in turn, round after round; the arguments are those of `_timing.interleave`."""
    room = torch.empty(FILL_BYTES, dtype=torch.uint8, device=device)
    for call in calls:
        for turn in range(WARM_UP):
            call(turn)
    torch.cuda.synchronize(device)
    samples: list[list[float]] = [[] for _ in calls]
    start = time.perf_counter()
    for turn in range(most):
        events = []
        for call in calls:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            room.zero_()
            begin.record()
            call(turn)
            end.record()
            events.append((begin, end))
        torch.cuda.synchronize(device)
        for own, (begin, end) in zip(samples, events, strict=True):
            own.append(begin.elapsed_time(end) * 1e-3)
        if turn + 1 >= least and time.perf_counter() - start > seconds:
            break
    return [_timing.summarise(own) for own in samples]
