"""The scan at all positions with D, z, delta_bias and softplus, 128 channels, against mamba-ssm's CUDA kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench import _bounds
from bench.peers._problem import INPUTS, Arguments, Problem, Shape, channels_first, draw, through
from fastm2rec import ops
from fastm2rec.reference.selective_scan import selective_scan as specification

DIM = 128
SPECIAL = 3  # softplus is an exponential and a logarithm, the output gate's SiLU an exponential


def problem(shape: Shape, device: torch.device, autotune: bool) -> Problem:
    """u, delta, A, B, C, D, z, delta_bias, as `ops.selective_scan` names them."""
    assert shape.d_state is not None
    drawn: dict[str, Any] = {
        "device": device,
        "generator": torch.Generator(device).manual_seed(shape.seq_len),
    }
    A, D, bias = weights(shape.d_state, drawn)
    sizes: dict[str, Any] = {**drawn, "dtype": shape.torch_dtype}

    def arguments() -> Arguments:
        u, delta, z = (channels_first(shape.batch, DIM, shape.seq_len, **sizes) for _ in range(3))
        B, C = (channels_first(shape.batch, shape.d_state or 0, shape.seq_len, **sizes) for _ in range(2))
        return u, delta, A, B, C, D, z, bias

    def call(*arguments: Tensor | None, impl: str) -> Tensor:
        scan: Any = ops.selective_scan
        return scan(*arguments, True, impl=impl)

    def reference(*arguments: Tensor | None) -> Tensor:
        scan: Any = specification
        return scan(*arguments, True)

    return Problem(
        what=f"E={DIM}, D, z, softplus",
        inputs=[arguments() for _ in range(INPUTS)],
        batched=(True, True, False, True, True, False, True, False),
        learned=(True,) * 8,
        reference=reference,
        peers=[
            through("selective_scan", "cpu", call, device),
            through("selective_scan", "triton", call, device),
            through("selective_scan", "mamba_ssm", call, device, layout=time_innermost),
            through("selective_scan", "reference", call, device),
        ],
        work=_work(shape),
    )


def weights(d_state: int, drawn: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """A as Mamba starts it, D, and a bias that makes steps of 0.01 to 0.1."""
    A = -torch.arange(1.0, d_state + 1, device=drawn["device"]).repeat(DIM, 1)
    D = draw(DIM, dtype=torch.float32, **drawn)
    steps = 10 ** (-1 - torch.rand(DIM, **drawn))
    return A, D, steps + torch.log(-torch.expm1(-steps))


def time_innermost(arguments: Arguments) -> Arguments:
    """mamba-ssm reads along time; in the layout of a transposed Linear it would begin with copies."""
    return tuple(x.contiguous() if x is not None and x.dim() == 3 else x for x in arguments)


def _work(shape: Shape) -> _bounds.Work:
    """An exponential for each state, an update and a read of it; u, delta, z, B and C are read once, y is written.

    The backward pass makes the states again (keeping them would move N times the bytes), and a gradient of each input.
    """
    assert shape.d_state is not None
    places = shape.batch * shape.seq_len
    training = shape.phase == "training"
    return _bounds.Work(
        special=float(places * DIM * (shape.d_state + SPECIAL) * (2 if training else 1)),
        operations=float(places * DIM * shape.d_state * 6 * (3 if training else 1)),
        bytes=float(
            shape.torch_dtype.itemsize
            * places
            * (4 * DIM + 2 * shape.d_state + training * (7 * DIM + 4 * shape.d_state))
        ),
    )
