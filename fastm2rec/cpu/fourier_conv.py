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
def response_of(seqlen: int, columns: int, width: int, dtype: torch.dtype) -> Tensor:
    """What makes H, G and the taps, w_0 first, of the taps in the order of the weights: [2 frequencies + width, width].

    cos and sin of j theta_k, and a unit matrix turned round.
    """
    with torch.inference_mode(False):  # it is kept, and may be used for training
        j = torch.arange(width - 1, -1, -1)
        angle = (2 * math.pi / seqlen) * ((torch.arange(columns // 2 + 1)[:, None] * j) % seqlen).to(dtype)
        return torch.cat([angle.cos(), angle.sin(), torch.eye(width, dtype=dtype).flip(0)])


@torch.library.custom_op("fastm2rec::cpu_fourier_conv", mutates_args=(), device_types="cpu")
def _forward_op(x: Tensor, conv_weight: Tensor, basis: Tensor) -> Tensor:
    from . import fourier_kernels as kernels

    dtype, (batch, _, dim), (dim_out, width) = x.dtype, x.shape, conv_weight.shape
    columns = basis.shape[1]
    response = response_of(basis.shape[0], columns, width, dtype) @ conv_weight.t()
    out = torch.empty(batch, columns, dim_out, dtype=dtype)
    arrays = [as_flat(t, dtype) for t in (x, response, None, basis[: width - 1], out)]
    run(kernels.forward, (*arrays, columns, width, dim), batch, ROWS, width * 64, dtype)
    return out


@_forward_op.register_fake
def _(x, conv_weight, basis):
    return x.new_empty(x.shape[0], basis.shape[1], x.shape[2])


@torch.library.custom_op("fastm2rec::cpu_fourier_conv_backward", mutates_args=(), device_types="cpu")
def _backward_op(dout: Tensor, x: Tensor, conv_weight: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    from . import fourier_kernels as kernels

    dtype, (batch, _, dim), width = x.dtype, x.shape, conv_weight.shape[1]
    columns = basis.shape[1]
    groups, response = -(-batch // kernels.GROUP), response_of(basis.shape[0], columns, width, dtype)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    sums = torch.empty(groups, len(response), dim, dtype=dtype)
    inputs = (x, dout, response @ conv_weight.t(), None, basis[: width - 1])
    arrays = [as_flat(t, dtype) for t in (*inputs, dx, sums)]
    run(kernels.backward, (*arrays, batch, columns, width, dim), groups, ROWS // kernels.GROUP, width * 64, dtype)
    return dx, sums.sum(0).t() @ response


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
