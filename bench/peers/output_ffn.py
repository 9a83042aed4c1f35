"""What follows the scan in a layer: a Linear, a LayerNorm, two Linears with GELU between them, a LayerNorm.

Without dropout, which each implementation draws in its own way. The peers: torch's functions one after the other, eager
(the reference) and compiled.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench import _bounds
from bench.peers._problem import INPUTS, Arguments, Problem, Shape, compiled, draw, through
from fastm2rec import ops
from fastm2rec.reference.output_ffn import output_ffn as specification

D_MODEL, D_INNER, HIDDEN, EPS = 64, 128, 256, 1e-5
NORM, NORM_BACKWARD = 7, 11  # operations for each number, see `_work`


def problem(shape: Shape, device: torch.device, autotune: bool) -> Problem:
    """y, out_weight, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, last_weight, last_bias."""
    sizes: dict[str, Any] = {
        "device": device, "generator": torch.Generator(device).manual_seed(shape.batch), "dtype": shape.torch_dtype,
    }  # fmt: skip

    def matrix(rows: int, columns: int) -> Tensor:
        return draw(rows, columns, **sizes) * columns**-0.5

    def vector(size: int) -> Tensor:
        return draw(size, **sizes)

    parameters = (
        matrix(D_MODEL, D_INNER), vector(D_MODEL), vector(D_MODEL), matrix(HIDDEN, D_MODEL), vector(HIDDEN),
        matrix(D_MODEL, HIDDEN), vector(D_MODEL), vector(D_MODEL), vector(D_MODEL),
    )  # fmt: skip

    def arguments() -> Arguments:
        return draw(shape.batch, D_INNER, **sizes), *parameters

    def call(y: Tensor, out_weight: Tensor, *rest: Tensor, impl: str) -> Tensor:
        function: Any = ops.output_ffn
        return function(y, None, out_weight, None, *rest, EPS, 0.0, impl=impl)

    def reference(y: Tensor, out_weight: Tensor, *rest: Tensor) -> Tensor:
        function: Any = specification
        return function(y, None, out_weight, None, *rest, EPS, 0.0)

    plain = through("output_ffn", "reference", call, device)
    return Problem(
        what=f"E={D_INNER}, D={D_MODEL}, H={HIDDEN}",
        inputs=[arguments() for _ in range(INPUTS)],
        batched=(True, *(False for _ in parameters)),
        learned=(True, *(True for _ in parameters)),
        reference=reference,
        peers=[through("output_ffn", "cpu", call, device), plain, *compiled(plain, device, autotune)],
        work=_work(shape),
    )


def _work(shape: Shape) -> _bounds.Work:
    """Weights and y are read, the result is written; in training its gradient is read, and those of y and of every
    parameter are written: what the backward pass needs besides is still in the cache.

    The products take two operations for each weight and row, and four more in the backward pass. Each of the two
    LayerNorms takes `NORM` operations a number (`embed_norm._work` counts them), backward `NORM_BACKWARD`: three for
    the gradients of weight and bias, one for the weight, three for two sums along the channels, four for what is left
    without them. An error function, of which one exponential is the least, makes each GELU.
    """
    training = shape.phase == "training"
    weights = D_MODEL * (D_INNER + 2 * HIDDEN)
    parameters = weights + 5 * D_MODEL + HIDDEN
    ends = shape.batch * (D_INNER + D_MODEL)
    norms = 2 * D_MODEL * (NORM + training * NORM_BACKWARD)
    return _bounds.Work(
        special=float(shape.batch * HIDDEN),
        operations=float(shape.batch * (2 * weights * (3 if training else 1) + norms)),
        bytes=float(shape.torch_dtype.itemsize * (parameters + ends) * (1 + training)),
    )
