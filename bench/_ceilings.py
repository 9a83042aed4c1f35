"""How fast a CUDA device does the four things that bounds are made of, measured in the run that they bound.

* Special functions: exponentials in registers, with nothing read in between. What a kernel may at best reach.
* Operations: a large matrix product in the dtype of the row; tf32 for float32, as the kernels may use it too.
* Bytes: a device-to-device copy many times the size of the cache; what is read and what is written both count.
* Launch: one kernel among many in a CUDA graph. No call takes less.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

LANES, ROUNDS = 1024, 256  # exponentials of a program at once, and one after the other
PROGRAMS = 1 << 14  # a hundred or so for every multiprocessor
MATRIX = 8192
COPY_BYTES = 1 << 30
GRAPH_KERNELS = 200


@dataclass(frozen=True)
class Rates:
    """Per second; `launch_s` is the time of one launch."""

    special: float
    operations: float
    bytes: float
    launch_s: float


@triton.jit
def exponentials_kernel(x_ptr, y_ptr, ROUNDS: tl.constexpr, LANES: tl.constexpr):
    """exp2 of its own negative, over and over: it stays between 0 and 1, and no round can be left out."""
    pid = tl.program_id(0).to(tl.int64)
    offs = pid * LANES + tl.arange(0, LANES)
    x = tl.load(x_ptr + offs)
    for _ in range(ROUNDS):
        x = tl.exp2(-x)
    tl.store(y_ptr + offs, x)


def measure(device: torch.device, dtype: torch.dtype) -> Rates:
    """Median rates; about a second."""
    x = torch.rand(PROGRAMS * LANES, device=device)
    y = torch.empty_like(x)
    a, b = (torch.randn(MATRIX, MATRIX, device=device, dtype=dtype) for _ in range(2))
    source = torch.randint(256, (COPY_BYTES,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        operations = 2 * MATRIX**3 / _seconds(lambda: torch.mm(a, b))
    finally:
        torch.set_float32_matmul_precision(precision)
    return Rates(
        special=PROGRAMS * LANES * ROUNDS / _seconds(lambda: exponentials_kernel[(PROGRAMS,)](x, y, ROUNDS, LANES)),
        operations=operations,
        bytes=2 * COPY_BYTES / _seconds(lambda: target.copy_(source)),
        launch_s=_launch(device),
    )


def _seconds(call: Callable[[], object], tries: int = 15) -> float:
    for _ in range(3):
        call()
    times = []
    for _ in range(tries):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3)
    return statistics.median(times)


def _launch(device: torch.device) -> float:
    x = torch.zeros(1, device=device)
    graph = torch.cuda.CUDAGraph()
    x.add_(1)
    torch.cuda.synchronize(device)
    with torch.cuda.graph(graph):
        for _ in range(GRAPH_KERNELS):
            x.add_(1)
    return _seconds(graph.replay) / GRAPH_KERNELS
