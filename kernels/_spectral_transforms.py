"""The two transforms of the spectral projection, one kernel each, for any number of columns and channels.

    analyse      S[r, s, c] = sum_t V[t + sign * s, r] x[t, c]
    synthesise   y[t, o]    = act(sum_s w_s[o] sum_r V[t + sign * s, r] P[r, o] + biases)

V is zero outside its rows, s is the delay of a tap of the causal convolution: w_s = conv_weight[:, width - 1 - s]. The
delays stand side by side as columns q = (s, r) of one wide basis tile, so all taps are one dot. Each transform is the
other's gradient with the sign turned. A program makes one tile of the output of one row and loops over the axis that
is summed; accumulators stay in registers.

Half precision enters the dots as it is and is summed in float32. Offsets into one row's basis are 32-bit, those into
anything with a batch 64-bit. The launchers behind the kernels choose the tiles, from the sizes of a row alone: the same
row has the same bits in any batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import Arithmetic, silu, silu_grad

# Reported spill-free for sm_80, sm_90 and sm_100 with 4 taps, in float32 too; not yet timed on a device.
_NUM_WARPS = 8
_REGISTERS = 255  # the assembler's own choice is at times a few too low, and spills
_MAX_ROWS = 64  # columns of the wide tile, taps and all
_BLOCK_CHANNELS = 64


@triton.jit
def basis_tile(
    basis_ptr, offs_t, first_column, seqlen, columns, stride_basis_t, stride_basis_r,
    BLOCK_R: tl.constexpr, TAPS: tl.constexpr, SIGN: tl.constexpr,
):  # fmt: skip
    """V[t + SIGN * s, r] at the columns q = (s, r), zero outside V: [BLOCK_T, TAPS * BLOCK_R]."""
    offs_q = tl.arange(0, TAPS * BLOCK_R)
    delay, r = SIGN * (offs_q // BLOCK_R), first_column + offs_q % BLOCK_R
    t = offs_t[:, None] + delay[None, :]
    inside = (t >= 0) & (t < seqlen) & (r < columns)[None, :]
    # One row's basis lies within 32-bit offsets: 64-bit ones take most of the registers.
    place = (offs_t * stride_basis_t)[:, None] + (delay * stride_basis_t + r * stride_basis_r)[None, :]
    return tl.load(basis_ptr + place, mask=inside, other=0.0)


@triton.jit
def tap_tile(conv_weight_ptr, offs_s, offs_o, width, channels, stride_conv_o, stride_conv_j):
    """w_s[o], zero where there is no such tap; offs_s and offs_o broadcast."""
    inside = (offs_s < width) & (offs_o < channels)
    place = offs_o * stride_conv_o + (width - 1 - offs_s) * stride_conv_j
    return tl.load(conv_weight_ptr + place, mask=inside, other=0.0)


@triton.jit
def analyse(
    x_ptr, basis_ptr, offs_c, first_column, seqlen, columns, channels,
    stride_x_t, stride_x_c, stride_basis_t, stride_basis_r,
    TAPS: tl.constexpr, SIGN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One row's S at the columns q = (s, r): [TAPS * BLOCK_R, BLOCK_C]."""
    total = tl.zeros([TAPS * BLOCK_R, BLOCK_C], ACC)
    for t0 in range(0, seqlen, BLOCK_T):
        offs_t = t0 + tl.arange(0, BLOCK_T)
        v = basis_tile(
            basis_ptr, offs_t, first_column, seqlen, columns, stride_basis_t, stride_basis_r, BLOCK_R, TAPS, SIGN
        )
        inside = (offs_t < seqlen)[:, None] & (offs_c < channels)[None, :]
        place = offs_t.to(tl.int64)[:, None] * stride_x_t + offs_c.to(tl.int64)[None, :] * stride_x_c
        x = tl.load(x_ptr + place, mask=inside, other=0.0)  # [BLOCK_T, BLOCK_C]
        total = tl.dot(tl.trans(v.to(DOT)), x.to(DOT), total, input_precision=PRECISION, out_dtype=ACC)
    return total


@triton.jit
def add_biases(
    y, bias_ptr, conv_weight_ptr, conv_bias_ptr, offs_t, offs_o, width, channels, stride_conv_o, stride_conv_j,
    HAS_BIAS: tl.constexpr, HAS_CONV_BIAS: tl.constexpr, TAPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y [BLOCK_T, BLOCK_O] plus conv_bias and bias, which passes through as many taps as there are positions so far."""
    inside = offs_o < channels
    if HAS_CONV_BIAS:
        y += tl.load(conv_bias_ptr + offs_o, mask=inside, other=0.0).to(ACC)[None, :]
    if HAS_BIAS:
        b = tl.load(bias_ptr + offs_o, mask=inside, other=0.0).to(ACC)
        if TAPS == 1:
            y += b[None, :]
        else:
            for s in tl.static_range(TAPS):
                w = tap_tile(conv_weight_ptr, s, offs_o, width, channels, stride_conv_o, stride_conv_j).to(ACC)
                y += tl.where((offs_t >= s)[:, None], (b * w)[None, :], 0.0)
    return y


@triton.jit
def analyse_kernel(
    x_ptr, basis_ptr, p_ptr, conv_weight_ptr, s_ptr, dw_ptr,
    seqlen, columns, channels, width,
    stride_x_batch, stride_x_t, stride_x_c, stride_basis_batch, stride_basis_t, stride_basis_r,
    stride_conv_o, stride_conv_j,
    COMBINE: tl.constexpr, TAPS: tl.constexpr, SIGN: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """S [B, columns, width, channels]; or COMBINE: dP = sum_s w_s S_s, as P [B, columns, channels], and each block of
    columns' share of dw_s = sum_r P[r] S_s[r] [B, column blocks, width, channels]."""
    pid = tl.program_id(0).to(tl.int64)
    blocks_r, blocks_c = tl.cdiv(columns, BLOCK_R), tl.cdiv(channels, BLOCK_C)
    pid_b, pid_r, pid_c = pid // (blocks_r * blocks_c), (pid // blocks_c) % blocks_r, pid % blocks_c
    first_column = pid_r.to(tl.int32) * BLOCK_R
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    spectrum = analyse(
        x_ptr + pid_b * stride_x_batch, basis_ptr + pid_b * stride_basis_batch, offs_c, first_column,
        seqlen, columns, channels, stride_x_t, stride_x_c, stride_basis_t, stride_basis_r,
        TAPS, SIGN, BLOCK_T, BLOCK_R, BLOCK_C, ACC, DOT, PRECISION,
    )  # fmt: skip
    offs_q = tl.arange(0, TAPS * BLOCK_R)
    q_s, q_r = offs_q // BLOCK_R, first_column + offs_q % BLOCK_R
    q_inside = ((q_s < width) & (q_r < columns))[:, None] & (offs_c < channels)[None, :]
    if COMBINE:
        offs_s, offs_r = tl.arange(0, TAPS), first_column + tl.arange(0, BLOCK_R)
        p_place = (pid_b * columns + q_r)[:, None] * channels + offs_c[None, :]
        p = tl.load(p_ptr + p_place, mask=q_inside, other=0.0).to(ACC)
        dw = tl.sum(tl.reshape(p * spectrum, [TAPS, BLOCK_R, BLOCK_C]), axis=1)  # [TAPS, BLOCK_C]
        dw_place = ((pid_b * blocks_r + pid_r) * width + offs_s)[:, None] * channels + offs_c[None, :]
        tl.store(dw_ptr + dw_place, dw, mask=(offs_s < width)[:, None] & (offs_c < channels)[None, :])
        taps = tap_tile(
            conv_weight_ptr, q_s[:, None], offs_c[None, :], width, channels, stride_conv_o, stride_conv_j
        ).to(ACC)
        dp = tl.sum(tl.reshape(taps * spectrum, [TAPS, BLOCK_R, BLOCK_C]), axis=0)  # [BLOCK_R, BLOCK_C]
        dp_place = (pid_b * columns + offs_r)[:, None] * channels + offs_c[None, :]
        inside = (offs_r < columns)[:, None] & (offs_c < channels)[None, :]
        tl.store(s_ptr + dp_place, dp, mask=inside)
    else:
        s_place = ((pid_b * columns + q_r) * width + q_s)[:, None] * channels + offs_c[None, :]
        tl.store(s_ptr + s_place, spectrum, mask=q_inside)


@triton.jit
def synthesise_kernel(
    p_ptr, basis_ptr, bias_ptr, conv_weight_ptr, conv_bias_ptr, dy_ptr, y_ptr,
    seqlen, columns, channels, width,
    stride_p_batch, stride_p_r, stride_p_s, stride_p_o, stride_basis_batch, stride_basis_t, stride_basis_r,
    stride_conv_o, stride_conv_j, stride_dy_batch, stride_dy_t, stride_dy_o,
    HAS_CONV: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CONV_BIAS: tl.constexpr,
    SILU: tl.constexpr, SILU_GRAD: tl.constexpr, TAPS: tl.constexpr, SIGN: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y [B, seqlen, channels] from P [B, columns, taps or 1, channels]; SILU_GRAD: dy silu'(y) in its place."""
    pid = tl.program_id(0).to(tl.int64)
    blocks_t, blocks_o = tl.cdiv(seqlen, BLOCK_T), tl.cdiv(channels, BLOCK_O)
    pid_b, pid_t, pid_o = pid // (blocks_t * blocks_o), (pid // blocks_o) % blocks_t, pid % blocks_o
    offs_t = pid_t.to(tl.int32) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_o = pid_o * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_q = tl.arange(0, TAPS * BLOCK_R)
    q_s = offs_q // BLOCK_R
    basis_ptr += pid_b * stride_basis_batch
    p_ptr += pid_b * stride_p_batch
    y = tl.zeros([BLOCK_T, BLOCK_O], ACC)
    for r0 in range(0, columns, BLOCK_R):
        v = basis_tile(basis_ptr, offs_t, r0, seqlen, columns, stride_basis_t, stride_basis_r, BLOCK_R, TAPS, SIGN)
        q_r = r0 + offs_q % BLOCK_R
        inside = ((q_r < columns) & (q_s < width))[:, None] & (offs_o < channels)[None, :]
        p_place = (q_r * stride_p_r + q_s * stride_p_s)[:, None] + (offs_o * stride_p_o)[None, :]
        p = tl.load(p_ptr + p_place, mask=inside, other=0.0)  # [TAPS * BLOCK_R, BLOCK_O]
        if HAS_CONV:
            taps = tap_tile(
                conv_weight_ptr, q_s[:, None], offs_o[None, :], width, channels, stride_conv_o, stride_conv_j
            )
            p = p.to(ACC) * taps.to(ACC)
        y = tl.dot(v.to(DOT), p.to(DOT), y, input_precision=PRECISION, out_dtype=ACC)
    y = add_biases(
        y, bias_ptr, conv_weight_ptr, conv_bias_ptr, offs_t, offs_o, width, channels, stride_conv_o, stride_conv_j,
        HAS_BIAS, HAS_CONV_BIAS, TAPS, ACC,
    )  # fmt: skip
    inside = (offs_t < seqlen)[:, None] & (offs_o < channels)[None, :]
    if SILU_GRAD:
        dy_place = offs_t.to(tl.int64)[:, None] * stride_dy_t + offs_o.to(tl.int64)[None, :] * stride_dy_o
        dy = tl.load(dy_ptr + pid_b * stride_dy_batch + dy_place, mask=inside, other=0.0)
        y = dy.to(ACC) * silu_grad(y)
    if SILU:
        y = silu(y)
    y_place = (pid_b * seqlen + offs_t)[:, None] * channels + offs_o[None, :]
    tl.store(y_ptr + y_place, y.to(y_ptr.dtype.element_ty), mask=inside)


def block(size: int, largest: int) -> int:
    """The smallest power of two that holds `size`, between what a dot takes and `largest`."""
    return min(largest, max(16, triton.next_power_of_2(size)))


def tap_count(width: int) -> int:
    """How many delays a tile holds for `width` taps: a power of two, at least two to tell it from no convolution."""
    return max(2, triton.next_power_of_2(width))


def strides(tensor: Tensor | None, count: int) -> tuple[int, ...]:
    return (0,) * count if tensor is None else tensor.stride()


def launch_analyse(x: Tensor, basis: Tensor, arithmetic: Arithmetic, width: int = 1) -> Tensor:
    """S [B, R, width, C] with the sign +; basis [B, L, R]."""
    batch, _, columns = basis.shape
    s = torch.empty(batch, columns, width, x.shape[2], dtype=arithmetic.acc, device=x.device)
    taps = 1 if width == 1 else tap_count(width)
    block_r = block(columns, max(16, _MAX_ROWS // taps))
    _analyse(x, basis, None, None, s, None, width, taps, 1, block_r, arithmetic)
    return s


def launch_combine(
    x: Tensor, basis: Tensor, p: Tensor, conv_weight: Tensor, arithmetic: Arithmetic
) -> tuple[Tensor, Tensor]:
    """dP = sum_s w_s S_s [B, R, C] and dw_s = sum_r P[r] S_s[r] [width, C] with the sign -; P [B, R, C] contiguous."""
    batch, _, columns = basis.shape
    channels, width = conv_weight.shape
    taps = tap_count(width)
    block_r = block(columns, max(16, _MAX_ROWS // taps))
    dp = torch.empty(batch, columns, channels, dtype=arithmetic.acc, device=x.device)
    dw = torch.empty(batch, triton.cdiv(columns, block_r), width, channels, dtype=arithmetic.acc, device=x.device)
    _analyse(x, basis, p, conv_weight, dp, dw, width, taps, -1, block_r, arithmetic)
    return dp, dw.sum((0, 1))


def _analyse(
    x: Tensor,
    basis: Tensor,
    p: Tensor | None,
    conv_weight: Tensor | None,
    s: Tensor,
    dw: Tensor | None,
    width: int,
    taps: int,
    sign: int,
    block_r: int,
    arithmetic: Arithmetic,
) -> None:
    batch, seqlen, channels = x.shape
    columns = basis.shape[2]
    block_c = block(channels, _BLOCK_CHANNELS)
    analyse_kernel[(batch * triton.cdiv(columns, block_r) * triton.cdiv(channels, block_c),)](
        x, basis, p, conv_weight, s, dw, seqlen, columns, channels, width,
        *x.stride(), *basis.stride(), *strides(conv_weight, 2),
        COMBINE=dw is not None, TAPS=taps, SIGN=sign, BLOCK_T=32, BLOCK_R=block_r, BLOCK_C=block_c,
        **arithmetic.constexprs, num_warps=_NUM_WARPS, maxnreg=_REGISTERS,
    )  # fmt: skip


def launch_synthesise(
    p: Tensor,
    basis: Tensor,
    arithmetic: Arithmetic,
    *,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    conv_weight: Tensor | None = None,
    conv_bias: Tensor | None = None,
    sign: int = -1,
    silu: bool = False,
    dy: Tensor | None = None,
) -> Tensor:
    """y [B, L, O] of `dtype` from P [B, R, O], or [B, R, width, O] for a P of every tap; `dy` asks for dy silu'(y)."""
    batch, seqlen, columns = basis.shape
    p = p.expand(batch, *p.shape[1:])
    channels = p.shape[-1]
    taps, width = 1, 1
    if p.dim() == 4 or conv_weight is not None:
        width = p.shape[2] if conv_weight is None else conv_weight.shape[1]
        taps = tap_count(width)
    block_o = block(channels, _BLOCK_CHANNELS)
    block_r = block(columns, max(16, _MAX_ROWS // taps))
    block_t = 64 if arithmetic.dot.itemsize == 2 else 32
    y = torch.empty(batch, seqlen, channels, dtype=dtype, device=basis.device)
    p_strides = p.stride() if p.dim() == 4 else (p.stride(0), p.stride(1), 0, p.stride(2))
    synthesise_kernel[(batch * triton.cdiv(seqlen, block_t) * triton.cdiv(channels, block_o),)](
        p, basis, bias, conv_weight, conv_bias, dy, y, seqlen, columns, channels, width,
        *p_strides, *basis.stride(), *strides(conv_weight, 2), *strides(dy, 3),
        HAS_CONV=conv_weight is not None, HAS_BIAS=bias is not None, HAS_CONV_BIAS=conv_bias is not None,
        SILU=silu and dy is None, SILU_GRAD=dy is not None, TAPS=taps, SIGN=sign,
        BLOCK_T=block_t, BLOCK_R=block_r, BLOCK_O=block_o,
        **arithmetic.constexprs, num_warps=_NUM_WARPS, maxnreg=_REGISTERS,
    )  # fmt: skip
    return y
