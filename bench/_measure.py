"""Problem in, rows out: every peer is checked against the reference first, then all are timed in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench import _bounds, _device_timing, _failure, _memory, _timing
from bench.peers._problem import INPUTS, Arguments, Peer, Problem, Shape

# Relative L2 error of each output and gradient. Half precision: inputs are rounded already, so what is left are the
# roundings of intermediate results; eight of 2^-8 that all point the same way. float32: sums of some thousand terms.
TOLERANCE = {"float32": 1e-4, "bfloat16": 8 * 2.0**-8}
REFERENCE_ROWS = 512  # at once
LEAST_ROUNDS = 3


@dataclass
class Row:
    """One measurement of one peer. Times are milliseconds per call; a row without times says why in `skipped`."""

    op: str
    phase: str
    impl: str
    mode: str
    dtype: str
    batch: int
    seq_len: int
    d_state: int | None
    what: str = ""
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    peak_mem_mb: float | None = None
    bound: str | None = None
    bound_ms: float | None = None
    bound_share: float | None = None
    rel_err: float | None = None
    skipped: str | None = None


def blank(shape: Shape, peer: Peer, what: str) -> Row:
    """The row of a peer before anything is known."""
    return Row(
        shape.op, shape.phase, peer.impl, peer.mode, shape.dtype, shape.batch, shape.seq_len, shape.d_state, what,
        skipped=peer.skipped,
    )  # fmt: skip


def measure(
    shape: Shape,
    problem: Problem,
    peers: Sequence[Peer],
    device: torch.device,
    ceilings: _bounds.Ceilings,
    seconds: float,
    stop: float,
) -> list[Row]:
    """Check and time `peers`; after `stop` (of time.perf_counter) nothing more is compiled.

    Where a peer takes the GPU with it, those without a time wait for another process, as their rows say.
    """
    rows: list[Row] = []
    ready: list[tuple[Row, Peer, Callable[[int], object]]] = []
    expected: list[Tensor] | None = None
    dy = gradient(problem, shape)
    lost = False
    for peer in peers:
        row = blank(shape, peer, problem.what)
        rows.append(row)
        if lost:
            row.skipped = row.skipped or _failure.WAITING
        if row.skipped is None and shape.phase == "training" and not peer.trains:
            row.skipped = "has no gradient"
        if row.skipped is None and peer.impl.startswith("triton") and device.type != "cuda":
            row.skipped = "Triton's interpreter is never timed"
        if row.skipped is None and peer.mode.startswith("compiled") and time.perf_counter() > stop:
            row.skipped = "the time budget ran out before it was compiled (--budget-seconds)"
        if row.skipped is not None:
            continue
        try:
            if expected is None:
                expected = list(reference_results(problem, shape, dy))
            call = caller(peer, problem, shape, dy)
            row.rel_err = error_of(call(0), expected)
            if not row.rel_err <= TOLERANCE[shape.dtype] + peer.error:
                row.skipped = f"wrong: differs from its reference by {row.rel_err:.1e} (relative L2)"
                continue
            if device.type == "cuda" and not peer.foreign:  # a CPU's measurement would disturb the times
                row.peak_mem_mb = _memory.peak_mb(call, device)
        except Exception as error:  # a peer that fails is a row that says so, not the end of the run
            row.skipped = _failure.told(error, device)
            lost = _failure.concerns(row.skipped)
            continue
        row.bound, row.bound_ms = ceilings.bound(peer.work or problem.work)
        ready.append((row, peer, call))
    del expected
    if lost:
        for row, *_ in ready:
            row.skipped, row.peak_mem_mb = _failure.WAITING, None
        return rows
    interleave = _device_timing.interleave if device.type == "cuda" else _timing.interleave
    timings = interleave([call for *_, call in ready], device, seconds, LEAST_ROUNDS) if ready else []
    for (row, *_), timing in zip(ready, timings, strict=True):
        if isinstance(timing, str):
            row.skipped, row.peak_mem_mb = timing, None
            continue
        row.median_ms, row.p20_ms, row.p80_ms = timing.median_ms, timing.p20_ms, timing.p80_ms
        assert row.bound_ms is not None
        row.bound_share = row.bound_ms / timing.median_ms
    return rows


def gradient(problem: Problem, shape: Shape) -> Tensor | None:
    """The gradient of the output; None where only the forward pass is measured."""
    if shape.phase == "forward":
        return None
    few = tuple(
        x[:1] if x is not None and held else x for x, held in zip(problem.inputs[0], problem.batched, strict=True)
    )
    y = problem.reference(*_wide(few))
    generator = torch.Generator(y.device).manual_seed(1)
    return torch.randn(shape.batch, *y.shape[1:], generator=generator, device=y.device).to(shape.torch_dtype)


def caller(peer: Peer, problem: Problem, shape: Shape, dy: Tensor | None) -> Callable[[int], list[Tensor]]:
    """Turn's inputs to the output, with the gradients in training; layouts and leaves are made outside the timing."""
    assert peer.run is not None
    run = peer.run
    sets = [peer.layout(arguments) for arguments in problem.inputs]
    if dy is None:

        def forward(turn: int) -> list[Tensor]:
            with torch.inference_mode():
                return [run(*sets[turn % INPUTS])]

        return forward
    leaves = [_leaves(arguments, problem.learned) for arguments in sets]
    given = dy

    def training(turn: int) -> list[Tensor]:
        arguments, wanted = leaves[turn % INPUTS]
        with torch.enable_grad():
            y = run(*arguments)
        return [y, *torch.autograd.grad(y, wanted, given)]

    return training


def _leaves(arguments: Arguments, learned: Sequence[bool]) -> tuple[Arguments, list[Tensor]]:
    made = tuple(
        x.detach().requires_grad_() if x is not None and wants else x
        for x, wants in zip(arguments, learned, strict=True)
    )
    return made, [x for x, wants in zip(made, learned, strict=True) if x is not None and wants]


def reference_results(problem: Problem, shape: Shape, dy: Tensor | None) -> Iterator[Tensor]:
    """What the first inputs give by the reference, in float32, a few rows at a time; with the gradients in training."""
    arguments = problem.inputs[0]
    parts: list[list[Tensor]] = []
    for start in range(0, shape.batch, REFERENCE_ROWS):
        rows = slice(start, start + REFERENCE_ROWS)
        few = _wide(
            tuple(x[rows] if x is not None and held else x for x, held in zip(arguments, problem.batched, strict=True))
        )
        if dy is None:
            with torch.inference_mode():
                parts.append([problem.reference(*few)])
            continue
        leaves, wanted = _leaves(few, problem.learned)
        with torch.enable_grad():
            y = problem.reference(*leaves)
        parts.append([y.detach(), *torch.autograd.grad(y, wanted, dy[rows].to(y.dtype))])
    held = [True, *(b for b, wants in zip(problem.batched, problem.learned, strict=True) if wants)]
    for whole, column in zip(held, zip(*parts, strict=True), strict=False):
        yield torch.cat(column) if whole else torch.stack(column).sum(0)


def _wide(arguments: Arguments) -> tuple[Any, ...]:
    return tuple(x.float() if x is not None and x.is_floating_point() else x for x in arguments)


def error_of(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative L2 error; infinite where something is not finite."""
    worst = 0.0
    for a, b in zip(got, expected, strict=True):
        if a.shape != b.shape:
            raise ValueError(f"returned shape {list(a.shape)}, expected {list(b.shape)}")
        error = float(torch.linalg.vector_norm(a.detach().float() - b) / torch.linalg.vector_norm(b).clamp(min=1e-30))
        worst = max(worst, error if error == error else float("inf"))
    return worst
