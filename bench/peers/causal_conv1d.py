"""The depthwise causal convolution in front of the scan: 4 taps, 128 channels that lie side by side. The peers: torch's
grouped conv1d and the reference's shifted products, eager and compiled, and causal-conv1d's CUDA kernel."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import _bounds
from bench.peers._problem import INPUTS, Arguments, Peer, Problem, Shape, channels_first, compiled, draw, through
from bench.peers.selective_scan import DIM
from fastm2rec import ops
from fastm2rec.reference.causal_conv1d import causal_conv1d as specification

WIDTH = 4


def problem(shape: Shape, device: torch.device, autotune: bool) -> Problem:
    """x, weight, bias, as `ops.causal_conv1d` names them; without SiLU, which the scan's kernels do."""
    drawn: dict[str, Any] = {"device": device, "generator": torch.Generator(device).manual_seed(shape.seq_len)}
    drawn["dtype"] = shape.torch_dtype
    weight, bias = draw(DIM, WIDTH, **drawn), draw(DIM, **drawn)

    def arguments() -> Arguments:
        return channels_first(shape.batch, DIM, shape.seq_len, **drawn), weight, bias

    def call(*arguments: Tensor | None, impl: str) -> Tensor:
        function: Any = ops.causal_conv1d
        return function(*arguments, impl=impl)

    def reference(*arguments: Tensor | None) -> Tensor:
        function: Any = specification
        return function(*arguments)

    plain, grouped = through("causal_conv1d", "reference", call, device), Peer("torch conv1d", "eager", _grouped)
    own = [through("causal_conv1d", name, call, device) for name in ("cpu", "triton", "mamba_ssm")]
    return Problem(
        what=f"E={DIM}, {WIDTH} taps",
        inputs=[arguments() for _ in range(INPUTS)],
        batched=(True, False, False),
        learned=(True, True, True),
        reference=reference,
        peers=[*own, plain, grouped, *compiled(plain, device, autotune), *compiled(grouped, device, autotune)],
        work=_work(shape),
    )


def _grouped(*arguments: Tensor | None) -> Tensor:
    x, weight, bias = arguments
    assert x is not None
    assert weight is not None
    return F.conv1d(F.pad(x, (WIDTH - 1, 0)), weight.unsqueeze(1), bias, groups=DIM)


def _work(shape: Shape) -> _bounds.Work:
    """x is read and y written; for each number a multiplication and an addition a tap, and the bias.

    The backward pass reads x and dy and writes dx: for each number two operations a tap for dx and for dw each, and one
    for the bias.
    """
    numbers, training = shape.batch * shape.seq_len * DIM, shape.phase == "training"
    taps = 2 * WIDTH
    return _bounds.Work(
        special=0.0,
        operations=float(numbers * (taps + 1 + training * (2 * taps + 1))),
        bytes=float(shape.torch_dtype.itemsize * numbers * (5 if training else 2)),
    )
