"""A block from its input to the scan at the last position: Linear, convolution, filter (theta 0.1), SiLU and scan; 64
channels in, 128 inside. What the CPU engine computes a row at a time in its cache, against the two ops in turn: of
plain PyTorch, eager and compiled, and of the kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench import _bounds
from bench.peers import last_scan
from bench.peers._problem import INPUTS, Arguments, Problem, Shape, compiled, draw, through
from bench.peers.last_scan import D_MODEL, DT_RANK
from bench.peers.selective_scan import DIM, weights
from fastm2rec import ops
from fastm2rec.basis import n_columns, row_basis
from fastm2rec.reference.filtered_last_scan import filtered_last_scan as specification

WIDTH, THETA = 4, 0.1


def problem(shape: Shape, device: torch.device, autotune: bool) -> Problem:
    """As `ops.filtered_last_scan` names them, from x to z; no bias before the convolution, and a hard mask's None."""
    assert shape.d_state is not None
    drawn: dict[str, Any] = {"device": device, "generator": torch.Generator(device).manual_seed(shape.seq_len)}
    sizes: dict[str, Any] = {**drawn, "dtype": shape.torch_dtype}
    A, D, dt_bias = weights(shape.d_state, drawn)
    weight = draw(DIM, D_MODEL, **sizes) * D_MODEL**-0.5
    conv_weight, conv_bias = draw(DIM, WIDTH, **sizes) * WIDTH**-0.5, draw(DIM, **sizes)
    x_proj = draw(DT_RANK + 2 * shape.d_state, DIM, **sizes) * DIM**-0.5
    dt_proj = draw(DIM, DT_RANK, **sizes) * DT_RANK**-0.5
    length = shape.seq_len
    columns = n_columns(length, THETA, "fourier")
    basis = row_basis(torch.tensor([length]), length, columns, "fourier", torch.float32)[0].to(device)
    lengths = torch.full((shape.batch,), length, device=device)

    def arguments() -> Arguments:
        x, z = draw(shape.batch, length, D_MODEL, **sizes), draw(shape.batch, DIM, **sizes)
        return x, lengths, basis, None, weight, None, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D, z

    def call(*arguments: Tensor | None, impl: str) -> Tensor:
        function: Any = ops.filtered_last_scan
        return function(*arguments, 1, impl=impl)

    def reference(*arguments: Tensor | None) -> Tensor:
        function: Any = specification
        return function(*arguments)

    plain = through("filtered_last_scan", "reference", call, device)
    return Problem(
        what=f"{D_MODEL} -> E={DIM}, R={columns}",
        inputs=[arguments() for _ in range(INPUTS)],
        batched=(True, True, *(False,) * 11, True),
        learned=(True, False, False, *(True,) * 11),
        reference=reference,
        peers=[
            # The engine leaves out states that have forgotten all they saw: what no data can spare is counted.
            through("filtered_last_scan", "cpu", call, device, work=_work(shape, columns, 0)),
            through("filtered_last_scan", "triton", call, device),
            through("filtered_last_scan", "mamba_ssm", call, device),
            plain,
            *compiled(plain, device, autotune),
        ],
        work=_work(shape, columns, shape.d_state),
    )


def _work(shape: Shape, columns: int, exponentials: int) -> _bounds.Work:
    """The scan's work as `last_scan` counts it, but x is read and, in training, its gradient written; not p.

    Before it the cheaper of two ways: Linear, convolution and filter at every position; or x's part in each column of
    the basis, on which the Linear is a product and the convolution a rotation of cosine and sine (two multiplications
    and additions each), and back to positions. The gradients are two more products for each.
    """
    scan = last_scan.work(shape, exponentials)
    places, training = shape.batch * shape.seq_len, shape.phase == "training"
    direct = places * DIM * (2 * D_MODEL + 2 * WIDTH + 4 * columns)
    on_columns = 2 * places * columns * (D_MODEL + DIM) + shape.batch * columns * DIM * (2 * D_MODEL + 4)
    return _bounds.Work(
        special=scan.special,
        operations=scan.operations + min(direct, on_columns) * (3 if training else 1),
        bytes=float(shape.torch_dtype.itemsize * places * D_MODEL * (2 if training else 1)),
    )
