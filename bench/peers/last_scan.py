"""From the convolution to the scan's output at the last position: SiLU, x_proj, softplus and the closed form, 128
channels. What the CPU engine computes in one pass, against plain PyTorch, eager and compiled."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bench import _bounds
from bench.peers._problem import INPUTS, Arguments, Problem, Shape, compiled, draw, through
from bench.peers.selective_scan import DIM, SPECIAL, weights
from fastm2rec import ops
from fastm2rec.reference.last_scan import last_scan as specification

D_MODEL = DIM // 2
DT_RANK = math.ceil(D_MODEL / 16)


def problem(shape: Shape, device: torch.device, autotune: bool) -> Problem:
    """p, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D, z, lengths, as `ops.last_scan` names them."""
    assert shape.d_state is not None
    drawn: dict[str, Any] = {"device": device, "generator": torch.Generator(device).manual_seed(shape.seq_len)}
    sizes: dict[str, Any] = {**drawn, "dtype": shape.torch_dtype}
    A, D, bias = weights(shape.d_state, drawn)
    x_proj = draw(DT_RANK + 2 * shape.d_state, DIM, **sizes) * DIM**-0.5
    dt_proj = draw(DIM, DT_RANK, **sizes) * DT_RANK**-0.5
    lengths = torch.full((shape.batch,), shape.seq_len, device=device)

    def arguments() -> Arguments:
        p, z = draw(shape.batch, shape.seq_len, DIM, **sizes), draw(shape.batch, DIM, **sizes)
        return p, x_proj, dt_proj, bias, A, D, z, lengths

    def call(*arguments: Tensor | None, impl: str) -> Tensor:
        function: Any = ops.last_scan
        return function(*arguments, impl=impl)

    def reference(*arguments: Tensor | None) -> Tensor:
        function: Any = specification
        return function(*arguments)

    plain = through("last_scan", "reference", call, device)
    return Problem(
        what=f"E={DIM}",
        inputs=[arguments() for _ in range(INPUTS)],
        batched=(True, False, False, False, False, False, True, True),
        learned=(True,) * 7 + (False,),
        reference=reference,
        peers=[
            # The engine leaves out states that have forgotten all they saw: what no data can spare is counted.
            through("last_scan", "cpu", call, device, work=work(shape, 0)),
            through("last_scan", "triton", call, device),
            through("last_scan", "mamba_ssm", call, device),
            plain,
            *compiled(plain, device, autotune),
        ],
        work=work(shape, shape.d_state),
    )


def work(shape: Shape, exponentials: int) -> _bounds.Work:
    """p is read once. At each place, for each channel and each of `exponentials` states: an exponential, its part of B,
    and of the sum; for each channel SiLU, softplus and the step size. C is needed at the last position only.

    The backward pass reads p again, writes its gradient, makes the exponentials again and has two products for one.
    """
    places, training = shape.batch * shape.seq_len, shape.phase == "training"
    products = 2 * DIM * (DT_RANK + exponentials) + 2 * DIM * DT_RANK
    return _bounds.Work(
        special=float(places * DIM * (exponentials + SPECIAL) * (2 if training else 1)),
        operations=float(places * (products + 4 * DIM * exponentials) * (3 if training else 1)),
        bytes=float(shape.torch_dtype.itemsize * places * DIM * (3 if training else 1)),
    )
