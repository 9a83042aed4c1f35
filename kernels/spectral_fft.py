"""The Fourier filter of long sequences: cuFFT, one kernel on the kept bins, cuFFT back.

    X = rfft(x)        Z[k] = (g[k] X[k]) W^T for k < K, else 0; Z[0] += L b        y = irfft(Z)

The kernel masks and projects the K kept complex bins alone, and writes all of the half spectrum that the inverse
transform reads; the dropped bins of X are never read. W is real, so real and imaginary parts are just columns of their
own: with channels in front, X is [C, 2 (L // 2 + 1)] of real numbers without gaps, and a program makes one tile of the
product W (g X).

Gradients: dX = g (W^T dZ), the same kernel with W turned and the gains behind it; dg = Re(conj(X) W^T dZ), summed over
rows; dW = dZ (g X)^T; db = L dZ[0]. The transforms differentiate themselves.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import compute_dtype, dot_precision, triton_dtype

BLOCK_Q, BLOCK_C, NUM_WARPS = 64, 32, 8


@triton.jit
def _bin_gains(
    gain_ptr, offs_c, offs_q, bins, channels, stride_gain_k, stride_gain_c, PER_CHANNEL: tl.constexpr
):  # fmt: skip
    """The gains at [BLOCK_C, BLOCK_Q], or [1, BLOCK_Q]: both parts of a bin have the same, dropped bins have 0."""
    k = offs_q // 2
    place = gain_ptr + k * stride_gain_k
    if PER_CHANNEL:
        place = place[None, :] + (offs_c * stride_gain_c)[:, None]
        return tl.load(place, mask=(offs_c < channels)[:, None] & (k < bins)[None, :], other=0.0)
    else:
        return tl.load(place, mask=k < bins, other=0.0)[None, :]


@triton.jit
def bins_kernel(
    x_ptr, gain_ptr, weight_ptr, bias_ptr, z_ptr,
    bins, parts, channels, out_channels, seqlen,
    stride_x_batch, stride_x_c, stride_x_q, stride_gain_k, stride_gain_c, stride_weight_o, stride_weight_c,
    HAS_GAIN: tl.constexpr, GAIN_LAST: tl.constexpr, PER_CHANNEL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """z [B, out_channels, parts] from x [B, channels, parts], parts = 2 (L // 2 + 1)."""
    pid = tl.program_id(0).to(tl.int64)
    blocks_q, blocks_o = tl.cdiv(parts, BLOCK_Q), tl.cdiv(out_channels, BLOCK_O)
    pid_b, pid_q, pid_o = pid // (blocks_q * blocks_o), (pid // blocks_o) % blocks_q, pid % blocks_o
    offs_q = pid_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    offs_o = pid_o * BLOCK_O + tl.arange(0, BLOCK_O)
    x_ptr += pid_b * stride_x_batch
    kept = offs_q < 2 * bins
    z = tl.zeros([BLOCK_O, BLOCK_Q], ACC)
    # Without a weight output channels are input channels; a tile of dropped bins reads nothing.
    first_channel = 0 if HAS_WEIGHT else pid_o * BLOCK_O
    end = channels if HAS_WEIGHT else first_channel + BLOCK_C
    end = tl.where(pid_q * BLOCK_Q < 2 * bins, end, first_channel)
    for c0 in range(first_channel, end, BLOCK_C):
        offs_c = c0 + tl.arange(0, BLOCK_C)
        inside = (offs_c < channels)[:, None] & kept[None, :]
        place = offs_c.to(tl.int64)[:, None] * stride_x_c + (offs_q * stride_x_q)[None, :]
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(ACC)  # [BLOCK_C, BLOCK_Q]
        if HAS_GAIN & (not GAIN_LAST):
            x *= _bin_gains(
                gain_ptr, offs_c, offs_q, bins, channels, stride_gain_k, stride_gain_c, PER_CHANNEL
            ).to(ACC)  # fmt: skip
        if HAS_WEIGHT:
            w_place = (offs_o * stride_weight_o)[:, None] + (offs_c * stride_weight_c)[None, :]
            inside = (offs_o < out_channels)[:, None] & (offs_c < channels)[None, :]
            w = tl.load(weight_ptr + w_place, mask=inside, other=0.0).to(ACC)  # [BLOCK_O, BLOCK_C]
            z = tl.dot(w, x, z, input_precision=PRECISION, out_dtype=ACC)
        else:
            z = x
    if HAS_GAIN & GAIN_LAST:
        z *= _bin_gains(
            gain_ptr, offs_o, offs_q, bins, out_channels, stride_gain_k, stride_gain_c, PER_CHANNEL
        ).to(ACC)  # fmt: skip
    if HAS_BIAS:
        b = tl.load(bias_ptr + offs_o, mask=offs_o < out_channels, other=0.0).to(ACC)
        z += tl.where(offs_q == 0, seqlen, 0).to(ACC)[None, :] * b[:, None]
    z_place = (pid_b * out_channels + offs_o)[:, None] * parts + offs_q[None, :]
    tl.store(z_ptr + z_place, z, mask=(offs_o < out_channels)[:, None] & (offs_q < parts)[None, :])


def launch_bins(
    x: Tensor,
    gain: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    bins: int,
    seqlen: int,
    gain_last: bool = False,
) -> Tensor:
    """z [B, C_out, 2 F] from x [B, C, 2 F], the parts of F complex bins, of which the first `bins` count."""
    batch, channels, parts = x.shape
    out_channels = channels if weight is None else weight.shape[0]
    acc = compute_dtype(x)
    z = torch.empty(batch, out_channels, parts, dtype=acc, device=x.device)
    gain_strides = (0, 0) if gain is None else (gain.stride(0), gain.stride(1) if gain.dim() == 2 else 0)
    block_o = BLOCK_C if weight is None else min(64, max(16, triton.next_power_of_2(out_channels)))
    bins_kernel[(batch * triton.cdiv(parts, BLOCK_Q) * triton.cdiv(out_channels, block_o),)](
        x, gain, weight, bias, z, bins, parts, channels, out_channels, seqlen,
        *x.stride(), *gain_strides, *((0, 0) if weight is None else weight.stride()),
        HAS_GAIN=gain is not None, GAIN_LAST=gain_last, PER_CHANNEL=gain is not None and gain.dim() == 2,
        HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None,
        BLOCK_Q=BLOCK_Q, BLOCK_C=BLOCK_C, BLOCK_O=block_o,
        ACC=triton_dtype(acc), PRECISION=dot_precision(acc), num_warps=NUM_WARPS,
    )  # fmt: skip
    return z


@torch.library.custom_op("fastm2rec::spectral_bins", mutates_args=())
def _forward_op(x: Tensor, gain: Tensor, weight: Tensor | None, bias: Tensor | None, seqlen: int) -> Tensor:
    return launch_bins(x, gain, weight, bias, bins=gain.shape[0], seqlen=seqlen)


@_forward_op.register_fake
def _(x: Tensor, gain: Tensor, weight: Tensor | None, bias: Tensor | None, seqlen: int) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] if weight is None else weight.shape[0], x.shape[2])


@torch.library.custom_op("fastm2rec::spectral_bins_backward", mutates_args=())
def _backward_op(
    dz: Tensor, x: Tensor, gain: Tensor, weight: Tensor | None, bias: Tensor | None, seqlen: int, needs_gain: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, gain, weight and bias; empty where there is nothing to give."""
    bins = gain.shape[0]
    back = None if weight is None else weight.t()
    dx = launch_bins(dz, gain, back, None, bins=bins, seqlen=seqlen, gain_last=True)
    d_gain, d_weight, d_bias = dz.new_empty(0), dz.new_empty(0), dz.new_empty(0)
    kept = x[:, :, : 2 * bins].unflatten(2, (bins, 2))
    if needs_gain:
        ungained = launch_bins(dz, None, back, None, bins=bins, seqlen=seqlen)[:, :, : 2 * bins]
        d_gain = (kept * ungained.unflatten(2, (bins, 2))).sum((0, 3)).t()  # [K, C]
        d_gain = (d_gain.sum(1) if gain.dim() == 1 else d_gain.contiguous()).to(gain.dtype)
    if weight is not None:
        gains = gain.unsqueeze(1) if gain.dim() == 1 else gain
        masked = (kept * gains.t().unsqueeze(2)).flatten(2)
        d_weight = torch.einsum("boq,bcq->oc", dz[:, :, : 2 * bins], masked).to(weight.dtype)
    if bias is not None:
        d_bias = (seqlen * dz[:, :, 0].sum(0)).to(bias.dtype)
    return dx, d_gain, d_weight, d_bias


@_backward_op.register_fake
def _(
    dz: Tensor, x: Tensor, gain: Tensor, weight: Tensor | None, bias: Tensor | None, seqlen: int, needs_gain: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_gain, d_weight, d_bias = (
        dz.new_empty(0) if leaf is None else leaf.new_empty(leaf.shape)
        for leaf in (gain if needs_gain else None, weight, bias)
    )
    return x.new_empty(x.shape), d_gain, d_weight, d_bias


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.seqlen = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
    x, gain, weight, bias = ctx.saved_tensors
    grads = _backward_op(dz, x, gain, weight, bias, ctx.seqlen, ctx.needs_input_grad[1])
    return *(grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad[:4], strict=True)), None


_forward_op.register_autograd(_backward, setup_context=_save)


def spectral_projection_fft(
    x: Tensor, gain: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """As `fastm2rec.reference.spectral_projection.spectral_projection_fft`."""
    seqlen = x.shape[1]
    bins = torch.fft.rfft(x.mT.to(compute_dtype(x, gain, weight, bias)))  # [B, C, L // 2 + 1]
    parts = torch.view_as_real(bins).flatten(2)
    z = _forward_op(parts, gain, weight, bias, seqlen)
    return torch.fft.irfft(torch.view_as_complex(z.unflatten(2, (-1, 2))), n=seqlen).mT.to(x.dtype)
