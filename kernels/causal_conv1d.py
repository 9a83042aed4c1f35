"""The depthwise causal convolution in front of the scan, with SiLU.

    p[t] = b + sum_j w_j x[t - (W-1) + j]        y = silu(p), or p        (x before the first position is 0)

Gradients, with g = dy silu'(p), or dy:

    dx[t] = sum_j w_j g[t + (W-1) - j]      dw_j = sum_{b,t} g[t] x[t - (W-1) + j]      db = sum_{b,t} g[t]

One program makes a tile [BLOCK_T, BLOCK_E] of one row; the W shifted loads of a tile come out of the L1 cache. The
backward pass is two kernels: the first recomputes p, writes g and each tile's sums for dw and db, the second is the
convolution again with the taps reversed. The sums of the tiles are added up in a fixed order: no atomics.

x is (B, dim, seqlen) with any strides; results have channels side by side, as the model's [B, L, dim] tensors do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import compute_dtype, silu, silu_grad, triton_dtype

BLOCK_T, BLOCK_E, NUM_WARPS = 32, 64, 4


@triton.jit
def _load_shifted(
    x_ptr, pid_b, t, offs_e, seqlen, dim, stride_batch, stride_dim, stride_seqlen, ACC: tl.constexpr
):  # fmt: skip
    """x at positions t, zero outside 0..seqlen-1: [BLOCK_T, BLOCK_E]."""
    inside = (t[:, None] >= 0) & (t[:, None] < seqlen) & (offs_e[None, :] < dim)
    place = pid_b * stride_batch + t[:, None].to(tl.int64) * stride_seqlen + offs_e[None, :].to(tl.int64) * stride_dim
    return tl.load(x_ptr + place, mask=inside, other=0.0).to(ACC)


@triton.jit
def causal_conv1d_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr,
    seqlen, dim,
    stride_x_batch, stride_x_dim, stride_x_seqlen, stride_y_batch,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr, REVERSED: tl.constexpr, ACC: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """y [B, seqlen, dim] contiguous. REVERSED looks ahead instead of back: the gradient for x."""
    pid_b = tl.program_id(0).to(tl.int64)
    offs_t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_e = tl.program_id(2) * BLOCK_E + tl.arange(0, BLOCK_E)
    total = tl.zeros([BLOCK_T, BLOCK_E], ACC)
    if HAS_BIAS:
        total += tl.load(bias_ptr + offs_e, mask=offs_e < dim, other=0.0).to(ACC)[None, :]
    for j in tl.static_range(WIDTH):
        w = tl.load(weight_ptr + offs_e * WIDTH + j, mask=offs_e < dim, other=0.0).to(ACC)
        back = (j - (WIDTH - 1)) if REVERSED else (WIDTH - 1 - j)
        x = _load_shifted(
            x_ptr, pid_b, offs_t - back, offs_e, seqlen, dim, stride_x_batch, stride_x_dim, stride_x_seqlen, ACC
        )
        total += w[None, :] * x
    if SILU:
        total = silu(total)
    place = pid_b * stride_y_batch + offs_t[:, None].to(tl.int64) * dim + offs_e[None, :]
    inside = (offs_t[:, None] < seqlen) & (offs_e[None, :] < dim)
    tl.store(y_ptr + place, total.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def causal_conv1d_bwd_kernel(
    x_ptr, weight_ptr, bias_ptr, dy_ptr, g_ptr, dw_ptr, db_ptr,
    seqlen, dim,
    stride_x_batch, stride_x_dim, stride_x_seqlen,
    stride_dy_batch, stride_dy_dim, stride_dy_seqlen, stride_g_batch,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr, ACC: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """g [B, seqlen, dim] contiguous, and per tile of time the sums dw [B, n_t, WIDTH, dim] and db [B, n_t, dim]."""
    pid_b = tl.program_id(0).to(tl.int64)
    pid_t = tl.program_id(1)
    offs_t = pid_t * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_e = tl.program_id(2) * BLOCK_E + tl.arange(0, BLOCK_E)
    g = _load_shifted(dy_ptr, pid_b, offs_t, offs_e, seqlen, dim, stride_dy_batch, stride_dy_dim, stride_dy_seqlen, ACC)
    if SILU:
        total = tl.zeros([BLOCK_T, BLOCK_E], ACC)
        if HAS_BIAS:
            total += tl.load(bias_ptr + offs_e, mask=offs_e < dim, other=0.0).to(ACC)[None, :]
        for j in tl.static_range(WIDTH):
            w = tl.load(weight_ptr + offs_e * WIDTH + j, mask=offs_e < dim, other=0.0).to(ACC)
            x = _load_shifted(
                x_ptr, pid_b, offs_t - (WIDTH - 1 - j), offs_e, seqlen, dim,
                stride_x_batch, stride_x_dim, stride_x_seqlen, ACC,
            )  # fmt: skip
            total += w[None, :] * x
        g *= silu_grad(total)
    inside = (offs_t[:, None] < seqlen) & (offs_e[None, :] < dim)
    place = pid_b * stride_g_batch + offs_t[:, None].to(tl.int64) * dim + offs_e[None, :]
    tl.store(g_ptr + place, g.to(g_ptr.dtype.element_ty), mask=inside)
    tile = pid_b * tl.num_programs(1) + pid_t
    for j in tl.static_range(WIDTH):
        x = _load_shifted(
            x_ptr, pid_b, offs_t - (WIDTH - 1 - j), offs_e, seqlen, dim,
            stride_x_batch, stride_x_dim, stride_x_seqlen, ACC,
        )  # fmt: skip
        tl.store(dw_ptr + (tile * WIDTH + j) * dim + offs_e, tl.sum(g * x, axis=0), mask=offs_e < dim)
    if HAS_BIAS:
        tl.store(db_ptr + tile * dim + offs_e, tl.sum(g, axis=0), mask=offs_e < dim)


def _grid(batch: int, seqlen: int, dim: int) -> tuple[int, int, int]:
    return batch, triton.cdiv(seqlen, BLOCK_T), triton.cdiv(dim, BLOCK_E)


def launch_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    *,
    reversed: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """y [B, seqlen, dim], contiguous; `reversed` looks ahead instead of back."""
    batch, dim, seqlen = x.shape
    y = torch.empty(batch, seqlen, dim, dtype=dtype or x.dtype, device=x.device)
    causal_conv1d_fwd_kernel[_grid(batch, seqlen, dim)](
        x, weight.contiguous(), bias, y, seqlen, dim, *x.stride(), y.stride(0),
        WIDTH=weight.shape[1], HAS_BIAS=bias is not None, SILU=silu, REVERSED=reversed,
        ACC=triton_dtype(compute_dtype(x, weight)), BLOCK_T=BLOCK_T, BLOCK_E=BLOCK_E, num_warps=NUM_WARPS,
    )  # fmt: skip
    return y


def launch_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dx [B, seqlen, dim] contiguous, dw (dim, width), db (dim,)."""
    batch, dim, seqlen = x.shape
    width = weight.shape[1]
    acc = compute_dtype(x, weight)
    grid = _grid(batch, seqlen, dim)
    # g in the compute dtype: rounded to half precision here, it would be rounded twice.
    g = torch.empty(batch, seqlen, dim, dtype=acc, device=x.device)
    dw = torch.empty(batch, grid[1], width, dim, dtype=acc, device=x.device)
    db = torch.empty(batch, grid[1], dim, dtype=acc, device=x.device) if bias is not None else None
    causal_conv1d_bwd_kernel[grid](
        x, weight.contiguous(), bias, dy, g, dw, db, seqlen, dim, *x.stride(), *dy.stride(), g.stride(0),
        WIDTH=width, HAS_BIAS=bias is not None, SILU=silu, ACC=triton_dtype(acc),
        BLOCK_T=BLOCK_T, BLOCK_E=BLOCK_E, num_warps=NUM_WARPS,
    )  # fmt: skip
    dx = launch_forward(g.transpose(1, 2), weight, None, False, reversed=True, dtype=x.dtype)
    return (
        dx,
        dw.sum((0, 1)).t().to(weight.dtype),
        None if db is None or bias is None else db.sum((0, 1)).to(bias.dtype),
    )


@torch.library.custom_op("fastm2rec::causal_conv1d", mutates_args=())
def _forward_op(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    return launch_forward(x, weight, bias, silu)


@_forward_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    batch, dim, seqlen = x.shape
    return x.new_empty(batch, seqlen, dim)


@torch.library.custom_op("fastm2rec::causal_conv1d_backward", mutates_args=())
def _backward_op(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dw, db = launch_backward(dy, x, weight, bias, silu)
    return dx, dw.contiguous(), weight.new_empty(0) if db is None else db


@_backward_op.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> tuple[Tensor, Tensor, Tensor]:
    batch, dim, seqlen = x.shape
    db = weight.new_empty(0) if bias is None else torch.empty_like(bias)
    return x.new_empty(batch, seqlen, dim), weight.new_empty(weight.shape), db


def _save(ctx, inputs, output) -> None:
    x, weight, bias, ctx.silu = inputs
    ctx.save_for_backward(x, weight, bias)


def _backward(ctx, dy):
    x, weight, bias = ctx.saved_tensors
    dx, dw, db = _backward_op(dy.transpose(1, 2), x, weight, bias, ctx.silu)
    return dx.transpose(1, 2), dw, None if bias is None else db, None


_forward_op.register_autograd(_backward, setup_context=_save)


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """As `fastm2rec.reference.causal_conv1d.causal_conv1d`."""
    return _forward_op(x, weight, bias, activation == "silu").transpose(1, 2)
