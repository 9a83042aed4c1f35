"""The convolution in the low frequencies behind a custom op: what the kernels in `fourier_kernels.py` need."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .arrays import as_flat
from .threads import run

ROWS = 64  # of the batch: about a tenth of a millisecond


@functools.lru_cache(maxsize=16)
def _angles(seqlen: int, columns: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of j theta_k, [frequencies, width], in the order of the taps."""
    with torch.inference_mode(False):  # they are kept, and may be used for training
        j = torch.arange(width - 1, -1, -1)
        angle = (2 * math.pi / seqlen) * ((torch.arange(columns // 2 + 1)[:, None] * j) % seqlen).to(dtype)
        return angle.cos(), angle.sin()


def _response(conv_weight: Tensor, seqlen: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """`_angles`; and the taps [width, E], w_0 first."""
    return *_angles(seqlen, columns, conv_weight.shape[1], conv_weight.dtype), conv_weight.t().flip(0)


def launch_forward(x: Tensor, conv_weight: Tensor, basis: Tensor) -> Tensor:
    """`convolved_bins` without its gradient."""
    from . import fourier_kernels as kernels

    dtype, (batch, _, dim), (dim_out, width) = x.dtype, x.shape, conv_weight.shape
    columns = basis.shape[1]
    cos, sin, taps = _response(conv_weight, basis.shape[0], columns)
    out = torch.empty(batch, columns, dim_out, dtype=dtype)
    arrays = [
        as_flat(t, dtype) for t in (x, cos @ conv_weight.t(), sin @ conv_weight.t(), taps, basis[: width - 1], out)
    ]
    run(kernels.forward, (*arrays, columns, width, dim), batch, ROWS, width * 64, dtype)
    return out


@torch.library.custom_op("fastm2rec::cpu_fourier_conv", mutates_args=(), device_types="cpu")
def _forward_op(x: Tensor, conv_weight: Tensor, basis: Tensor) -> Tensor:
    return launch_forward(x, conv_weight, basis)


@_forward_op.register_fake
def _(x, conv_weight, basis):
    return x.new_empty(x.shape[0], basis.shape[1], x.shape[2])


def launch_backward(dout: Tensor, x: Tensor, conv_weight: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and of conv_weight."""
    from . import fourier_kernels as kernels

    dtype, (batch, _, dim), width = x.dtype, x.shape, conv_weight.shape[1]
    columns = basis.shape[1]
    groups, frequencies = -(-batch // kernels.GROUP), columns // 2 + 1
    cos, sin, taps = _response(conv_weight, basis.shape[0], columns)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dH, dG = torch.empty(2, groups, frequencies, dim, dtype=dtype)
    dtaps = torch.empty(groups, width, dim, dtype=dtype)
    inputs = (x, dout, cos @ conv_weight.t(), sin @ conv_weight.t(), taps, basis[: width - 1])
    arrays = [as_flat(t, dtype) for t in (*inputs, dx, dH, dG, dtaps)]
    run(kernels.backward, (*arrays, batch, columns, width, dim), groups, ROWS // kernels.GROUP, width * 64, dtype)
    dw = dH.sum(0).t() @ cos + dG.sum(0).t() @ sin + dtaps.sum(0).flip(0).t()
    return dx, dw


@torch.library.custom_op("fastm2rec::cpu_fourier_conv_backward", mutates_args=(), device_types="cpu")
def _backward_op(dout: Tensor, x: Tensor, conv_weight: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    return launch_backward(dout, x, conv_weight, basis)


@_backward_op.register_fake
def _(dout, x, conv_weight, basis):
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(conv_weight)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, dout):
    return *_backward_op(dout, *ctx.saved_tensors), None


_forward_op.register_autograd(_backward, setup_context=_save)


def convolved_bins(x: Tensor, conv_weight: Tensor, basis: Tensor) -> Tensor:
    """V^T conv(u) [B, R, E] from x = (V^T u, u[L - width + 1 :]) [B, R + width - 1, E] and the Fourier basis V [L, R].

    All of one dtype, float32 or float64; conv_weight [E, width]; E a multiple of 32 and L at least `width` - 1.
    """
    return _forward_op(x, conv_weight, basis)
