"""`output_ffn` as one node of autograd's graph: what the kernels in `output_ffn_kernels.py` need around them.

On a few hundred rows torch's operators take about as long for the arithmetic; what is saved are the operators, modules
and nodes, which after other work has been in the caches cost tens of microseconds each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..reference.output_ffn import output_ffn as reference
from .arrays import as_flat, empty_array, scratch
from .threads import run

MULTIPLY_ADDS = 2_000_000  # of a slice: about a tenth of a millisecond with what is between the products


class _OutputFFN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, eps: float, p: float, key: int, y: Tensor, residual: Tensor | None, *parameters: Tensor | None
    ) -> Tensor:
        from . import output_ffn_kernels as kernels

        dtype, (batch, inner), (hidden, dim) = y.dtype, y.shape, parameters[4].shape  # type: ignore[union-attr]
        sizes = kernels.Sizes(batch, inner, dim, hidden)
        out = torch.empty(batch, dim, dtype=dtype)
        arrays = kernels.Parameters(*(as_flat(tensor, dtype) for tensor in parameters))
        kept = kernels.as_kept(empty_array(kernels.kept_size(batch, dim, hidden), dtype), batch, dim, hidden)
        number = kept.x.dtype.type
        dropout = kernels.Dropout(key, round(p * 2**32), number(1 / (1 - p)))
        y_array = as_flat(y, dtype)
        with scratch(dim * (inner + 2 * hidden), dtype, "output_ffn") as turned:
            kernels.transposed(arrays, turned, sizes)
            ends = (y_array, as_flat(residual, dtype))
            arguments = (*ends, arrays, turned, kept, as_flat(out, dtype), dropout, number(eps), sizes)
            _run(kernels.forward, arguments, sizes, dtype)
        ctx.rest = y_array, arrays, kept, dropout, sizes
        ctx.save_for_backward(y, residual, *parameters)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        from . import output_ffn_kernels as kernels

        _, residual, *parameters = ctx.saved_tensors  # unchanged since, or this raises
        y_array, arrays, kept, dropout, sizes = ctx.rest
        (batch, inner, dim, hidden), dtype = sizes, dout.dtype
        dy = torch.empty(batch, inner, dtype=dtype)
        dresidual = None if residual is None else torch.empty(batch, dim, dtype=dtype)
        groups = -(-batch // kernels.GROUP)
        dvectors = torch.empty(groups, kernels.VECTORS * dim + hidden, dtype=dtype)
        dout_weight, dfc1, dfc2 = (torch.empty(parameters[i].shape, dtype=dtype) for i in (0, 4, 6))
        with scratch(batch * (2 * dim + hidden), dtype, "output_ffn slopes") as memory:
            slopes = kernels.as_slopes(memory, batch, dim, hidden)
            into = (as_flat(tensor, dtype) for tensor in (dy, dresidual, dvectors))
            arguments = (as_flat(dout, dtype), arrays, kept, slopes, *into, dropout, sizes)
            _run(kernels.backward, arguments, sizes, dtype)
            into = (as_flat(tensor, dtype) for tensor in (dout_weight, dfc1, dfc2))
            grain = max(1, 2 * MULTIPLY_ADDS // (kernels.UNIT * batch * hidden))
            units = (2 * dim + hidden) // kernels.UNIT
            run(kernels.weights, (y_array, kept, slopes, *into, sizes), units, grain, 0, dtype)
        summed = dvectors.sum(0).split([dim] * kernels.VECTORS + [hidden])
        dnorm, dnorm_bias, dlast, dlast_bias, dout_bias, dfc2_bias, dfc1_bias = summed
        gradients = (
            dout_weight, dout_bias, dnorm, dnorm_bias, dfc1, dfc1_bias, dfc2, dfc2_bias, dlast, dlast_bias
        )  # fmt: skip
        present = (None if x is None else dx for x, dx in zip(parameters, gradients, strict=True))
        return None, None, None, dy, dresidual, *present


def _run(kernel: Any, arguments: tuple[Any, ...], sizes: Any, dtype: torch.dtype) -> None:
    from . import output_ffn_kernels as kernels

    batch, inner, dim, hidden = sizes
    grain = max(1, MULTIPLY_ADDS // (kernels.GROUP * dim * (inner + 2 * hidden)))
    run(kernel, arguments, -(-batch // kernels.GROUP), grain, kernels.scratch_size(dim), dtype)


def output_ffn(
    y: Tensor,
    residual: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    last_weight: Tensor,
    last_bias: Tensor,
    eps: float,
    dropout: float,
) -> Tensor:
    """As `fastm2rec.reference.output_ffn.output_ffn`; the dropout is drawn by a key from torch's generator.

    Where the kernels cannot run (E, D or H no multiple of 32, half or mixed precision, autocast, a tracer's tensors, an
    empty batch) it is the reference.
    """
    tensors = (
        y, residual, out_weight, out_bias, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias,
        last_weight, last_bias,
    )  # fmt: skip
    if (
        torch.compiler.is_compiling()
        or type(y) is not Tensor
        or y.dtype not in (torch.float32, torch.float64)
        or any(tensor is not None and tensor.dtype != y.dtype for tensor in tensors)
        or any(size % 32 or not size for size in (*fc1_weight.shape, y.shape[1], len(y) * 32))
        or torch.is_autocast_enabled("cpu")
    ):
        return reference(*tensors, eps, dropout)
    key = int(torch.randint(2**62, ())) if dropout else 0
    return _OutputFFN.apply(eps, dropout, key, *tensors)
