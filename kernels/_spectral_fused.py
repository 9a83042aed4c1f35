"""The whole spectral projection in one kernel: x is read once, y is written once.

A program makes one row's BLOCK_O output channels: V^T x with all kept columns in registers, mask, Linear and taps of
the convolution on those few columns, then y in tiles of BLOCK_T positions. Programs of one row are neighbours, so that
all but the first find x in the L2 cache. Works while a row's columns fit in one tile; `_spectral_transforms` has the
rest.

    filter first (FILTER_LAST = False)   P = (m S_0) W^T               y[t] = sum_s w_s V[t - s] P
    filter last                          P = m sum_s w_s (S_s W^T)     y[t] = V[t] P

A bias in front of the filter comes through the basis' column sums k_s[r] = sum_t V[t + s, r].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import Arithmetic, silu
from ._spectral_transforms import add_biases, analyse, basis_tile, block, strides, tap_count, tap_tile

# What stays in registers bounds the tile of columns, taps and all. float32 dots are three TF32 ones with operands of
# their own, and hold a quarter. Reported spill-free for sm_80, sm_90 and sm_100 at 4 taps; not yet timed on a device.
MAX_COLUMNS = 64
_MAX_ROWS = {2: 256, 4: 64, 8: 64}  # by the size of a dot's operand
_BLOCK_C = 32
_NUM_WARPS = 8
# Two programs a multiprocessor, where registers allow: the loads of one hide behind the other's dots.
_REGISTERS = 128


@dataclass(frozen=True)
class Operands:
    """What the spectral projection of an x [B, L, C] takes: views with a batch axis, and the order of the parts.

    The basis has no gaps in a row, so that offsets into it fit in 32 bits; the mask is [B, R, channels of what is
    filtered].
    """

    basis: Tensor
    mask: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    conv_weight: Tensor | None
    conv_bias: Tensor | None
    filter_last: bool
    silu: bool
    arithmetic: Arithmetic

    @property
    def width(self) -> int:
        """The taps of the convolution, 0 for none."""
        return 0 if self.conv_weight is None else self.conv_weight.shape[1]

    @property
    def in_width(self) -> int:
        """How many delays the spectrum of x is taken at."""
        return max(1, self.width) if self.filter_last else 1


def fits(columns: int, width: int, arithmetic: Arithmetic) -> bool:
    """Can the fused kernel hold `columns`, with a convolution of `width` taps (0 for none)?"""
    taps = tap_count(width) if width else 1
    return columns <= MAX_COLUMNS and block(columns, MAX_COLUMNS) * taps <= _MAX_ROWS[arithmetic.dot.itemsize]


@triton.jit
def _column_sums(
    basis_ptr, seqlen, columns, stride_basis_t, stride_basis_r,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, TAPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """k_s[r] at the columns q = (s, r): [TAPS * BLOCK_R]."""
    total = tl.zeros([TAPS * BLOCK_R], ACC)
    for t0 in range(0, seqlen, BLOCK_T):
        offs_t = t0 + tl.arange(0, BLOCK_T)
        v = basis_tile(basis_ptr, offs_t, 0, seqlen, columns, stride_basis_t, stride_basis_r, BLOCK_R, TAPS, 1)
        total += tl.sum(v.to(ACC), axis=0)
    return total


@triton.jit
def _gains(mask_ptr, offs_r, offs_c, columns, channels, stride_mask_r, stride_mask_c):
    inside = (offs_r < columns)[:, None] & (offs_c < channels)[None, :]
    place = (offs_r * stride_mask_r)[:, None] + (offs_c * stride_mask_c)[None, :]
    return tl.load(mask_ptr + place, mask=inside, other=0.0)


@triton.jit
def fused_kernel(
    x_ptr, basis_ptr, mask_ptr, weight_ptr, bias_ptr, conv_weight_ptr, conv_bias_ptr, y_ptr, s_ptr,
    seqlen, columns, channels, out_channels, width,
    stride_x_batch, stride_x_t, stride_x_c, stride_basis_batch, stride_basis_t, stride_basis_r,
    stride_mask_batch, stride_mask_r, stride_mask_c, stride_weight_o, stride_weight_c, stride_conv_o, stride_conv_j,
    HAS_MASK: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CONV_BIAS: tl.constexpr,
    FILTER_LAST: tl.constexpr, SILU: tl.constexpr, SAVE: tl.constexpr,
    IN_TAPS: tl.constexpr, OUT_TAPS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y [B, seqlen, out_channels], and with SAVE the spectrum S [B, columns, width or 1, channels].

    IN_TAPS: the convolution lies in front of the filter; OUT_TAPS: behind it; 1 is none.
    """
    pid = tl.program_id(0).to(tl.int64)
    blocks_o = tl.cdiv(out_channels, BLOCK_O)
    pid_b, pid_o = pid // blocks_o, pid % blocks_o
    x_ptr += pid_b * stride_x_batch
    basis_ptr += pid_b * stride_basis_batch
    if HAS_MASK:
        mask_ptr += pid_b * stride_mask_batch
    offs_o = pid_o.to(tl.int32) * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_r = tl.arange(0, BLOCK_R)
    offs_q = tl.arange(0, IN_TAPS * BLOCK_R)
    q_s, q_r = offs_q // BLOCK_R, offs_q % BLOCK_R

    in_width = width if IN_TAPS > 1 else 1
    p = tl.zeros([IN_TAPS * BLOCK_R, BLOCK_O], ACC)
    # Without a weight output channels are input channels, and each block takes its own.
    first_channel = 0 if HAS_WEIGHT else pid_o.to(tl.int32) * BLOCK_O
    for c0 in range(first_channel, channels if HAS_WEIGHT else first_channel + BLOCK_C, BLOCK_C):
        offs_c = c0 + tl.arange(0, BLOCK_C)
        spectrum = analyse(
            x_ptr, basis_ptr, offs_c, 0, seqlen, columns, channels,
            stride_x_t, stride_x_c, stride_basis_t, stride_basis_r,
            IN_TAPS, 1, BLOCK_T, BLOCK_R, BLOCK_C, ACC, DOT, PRECISION,
        )  # fmt: skip
        if SAVE:
            mine = (pid_o == 0) | (not HAS_WEIGHT)
            s_place = (q_r * in_width + q_s)[:, None] * channels + offs_c[None, :]
            inside = ((q_r < columns) & (q_s < in_width) & mine)[:, None] & (offs_c < channels)[None, :]
            tl.store(s_ptr + pid_b * columns * in_width * channels + s_place, spectrum, mask=inside)
        if HAS_MASK & (not FILTER_LAST):
            gains = _gains(mask_ptr, offs_r, offs_c, columns, channels, stride_mask_r, stride_mask_c)
            spectrum *= gains.to(ACC)
        if HAS_WEIGHT:
            w_place = offs_c[:, None] * stride_weight_c + offs_o[None, :] * stride_weight_o
            inside = (offs_c < channels)[:, None] & (offs_o < out_channels)[None, :]
            w = tl.load(weight_ptr + w_place, mask=inside, other=0.0)  # [BLOCK_C, BLOCK_O]
            p = tl.dot(spectrum.to(DOT), w.to(DOT), p, input_precision=PRECISION, out_dtype=ACC)
        else:
            p = spectrum

    if IN_TAPS > 1:
        offs_s = tl.arange(0, IN_TAPS)
        taps = tap_tile(
            conv_weight_ptr, offs_s[:, None], offs_o[None, :], width, out_channels, stride_conv_o, stride_conv_j
        ).to(ACC)
        if HAS_BIAS | HAS_CONV_BIAS:
            sums = _column_sums(
                basis_ptr, seqlen, columns, stride_basis_t, stride_basis_r, BLOCK_T, BLOCK_R, IN_TAPS, ACC
            )
        if HAS_BIAS:
            p += sums[:, None] * tl.load(bias_ptr + offs_o, mask=offs_o < out_channels, other=0.0).to(ACC)[None, :]
        p = tl.sum(tl.reshape(p, [IN_TAPS, BLOCK_R, BLOCK_O]) * taps[:, None, :], axis=0)
        if HAS_CONV_BIAS:
            undelayed = tl.sum(tl.reshape(tl.where(q_s == 0, sums, 0.0), [IN_TAPS, BLOCK_R]), axis=0)
            conv_bias = tl.load(conv_bias_ptr + offs_o, mask=offs_o < out_channels, other=0.0).to(ACC)
            p += undelayed[:, None] * conv_bias[None, :]
    if HAS_MASK & FILTER_LAST:
        p *= _gains(mask_ptr, offs_r, offs_o, columns, out_channels, stride_mask_r, stride_mask_c).to(ACC)
    if OUT_TAPS > 1:
        offs_s = tl.arange(0, OUT_TAPS)
        taps = tap_tile(
            conv_weight_ptr, offs_s[:, None], offs_o[None, :], width, out_channels, stride_conv_o, stride_conv_j
        ).to(ACC)
        p = tl.reshape(p[None, :, :] * taps[:, None, :], [OUT_TAPS * BLOCK_R, BLOCK_O])
    p = p.to(DOT)

    for t0 in range(0, seqlen, BLOCK_T):
        offs_t = t0 + tl.arange(0, BLOCK_T)
        v = basis_tile(basis_ptr, offs_t, 0, seqlen, columns, stride_basis_t, stride_basis_r, BLOCK_R, OUT_TAPS, -1)
        y = tl.dot(v.to(DOT), p, input_precision=PRECISION, out_dtype=ACC)  # [BLOCK_T, BLOCK_O]
        if IN_TAPS == 1:
            y = add_biases(
                y, bias_ptr, conv_weight_ptr, conv_bias_ptr, offs_t, offs_o, width, out_channels,
                stride_conv_o, stride_conv_j, HAS_BIAS, HAS_CONV_BIAS, OUT_TAPS, ACC,
            )  # fmt: skip
        if SILU:
            y = silu(y)
        y_place = tl.arange(0, BLOCK_T)[:, None] * out_channels + offs_o[None, :]
        inside = (offs_t < seqlen)[:, None] & (offs_o < out_channels)[None, :]
        tl.store(y_ptr + (pid_b * seqlen + t0) * out_channels + y_place, y.to(y_ptr.dtype.element_ty), mask=inside)


def launch_fused(x: Tensor, op: Operands, *, save: bool) -> tuple[Tensor, Tensor]:
    """y [B, L, C_out] and, empty unless `save`, V^T x [B, R, width if the filter is last, else 1, C]."""
    batch, seqlen, channels = x.shape
    columns = op.basis.shape[2]
    out_channels = channels if op.weight is None else op.weight.shape[0]
    taps = tap_count(op.width) if op.width else 1
    y = torch.empty(batch, seqlen, out_channels, dtype=x.dtype, device=x.device)
    s_shape = (batch, columns, op.in_width, channels) if save else (0,)
    s = torch.empty(s_shape, dtype=op.arithmetic.acc, device=x.device)
    half = op.arithmetic.dot.itemsize == 2
    block_t = 32 if half and (taps == 1 or op.filter_last) else 16
    block_o = block(out_channels, (128 if taps == 1 else 64) if half else 32)
    block_c = block_o if op.weight is None else block(channels, _BLOCK_C)
    fused_kernel[(batch * triton.cdiv(out_channels, block_o),)](
        x, op.basis, op.mask, op.weight, op.bias, op.conv_weight, op.conv_bias, y, s,
        seqlen, columns, channels, out_channels, op.width,
        *x.stride(), *op.basis.stride(), *strides(op.mask, 3), *strides(op.weight, 2), *strides(op.conv_weight, 2),
        HAS_MASK=op.mask is not None, HAS_WEIGHT=op.weight is not None, HAS_BIAS=op.bias is not None,
        HAS_CONV_BIAS=op.conv_bias is not None, FILTER_LAST=op.filter_last, SILU=op.silu, SAVE=save,
        IN_TAPS=taps if op.filter_last else 1, OUT_TAPS=1 if op.filter_last else taps,
        BLOCK_T=block_t, BLOCK_R=block(columns, MAX_COLUMNS), BLOCK_C=block_c, BLOCK_O=block_o,
        **op.arithmetic.constexprs, num_warps=_NUM_WARPS, maxnreg=_REGISTERS if half and taps == 1 else 255,
    )  # fmt: skip
    return y, s
