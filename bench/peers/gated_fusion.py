"""The gate with two learned numbers: the text's row is looked up, mixed with the encoder's output, and goes through the
Linear. Eager it is four or five kernels, each shorter than its launch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import _bounds
from bench.peers._problem import INPUTS, Arguments, Peer, Problem, Shape, compiled, draw, through
from fastm2rec import ops

D_MODEL, TABLE_ROWS = 64, 12102  # the rows are Amazon Beauty's


def problem(shape: Shape, device: torch.device, autotune: bool) -> Problem:
    """h, text table, alpha, beta, weight, bias, ids."""
    drawn: dict[str, Any] = {"device": device, "generator": torch.Generator(device).manual_seed(shape.batch)}
    sizes: dict[str, Any] = {**drawn, "dtype": shape.torch_dtype}
    text = draw(TABLE_ROWS, D_MODEL, **sizes)
    weight, bias = draw(D_MODEL, D_MODEL, **sizes) * D_MODEL**-0.5, draw(D_MODEL, **sizes)
    alpha, beta = torch.tensor(0.6, device=device), torch.tensor(0.4, device=device)

    def arguments() -> Arguments:
        ids = torch.randint(TABLE_ROWS, (shape.batch,), **drawn)
        return draw(shape.batch, D_MODEL, **sizes), text, alpha, beta, weight, bias, ids

    def call(*arguments: Tensor | None, impl: str) -> Tensor:
        *tensors, ids = arguments
        function: Any = ops.gated_fusion
        return function(*tensors, ids=ids, impl=impl)

    def plain(
        h: Tensor, text: Tensor, alpha: Tensor, beta: Tensor, weight: Tensor, bias: Tensor, ids: Tensor
    ) -> Tensor:
        return F.linear((alpha * text[ids] + beta * h).to(h.dtype), weight, bias)

    ours, eager = through("gated_fusion", "triton", call, device), Peer("torch", "eager", plain)
    chains = compiled(eager, device, autotune)
    return Problem(
        what=f"D={D_MODEL}, {TABLE_ROWS} texts",
        inputs=[arguments() for _ in range(INPUTS)],
        batched=(True, False, False, False, False, False, True),
        learned=(True, True, True, True, True, True, False),
        reference=plain,
        peers=[
            ours, through("gated_fusion", "cpu", call, device), eager, *chains,
        ],
        work=_work(shape),
    )  # fmt: skip


def _work(shape: Shape) -> _bounds.Work:
    """h and each row's text are read, y is written. Backward: dy, h and the text again, dh and the table's gradient."""
    training = shape.phase == "training"
    rows = shape.batch * D_MODEL
    numbers = 3 * rows + D_MODEL * D_MODEL + training * (4 * rows + D_MODEL * D_MODEL + TABLE_ROWS * D_MODEL)
    return _bounds.Work(
        special=0.0,
        operations=2.0 * rows * D_MODEL * (3 if training else 1),
        bytes=float(shape.torch_dtype.itemsize * numbers + 8 * shape.batch),
    )
