"""Gradients of the last position's closed form, in one ascending pass; always with exact exponentials.

With X = exp(A T), g = delta u, and dy the gradient of y before the gate:

    R_tn = sum_e dy_e g_te X_ten        dB_tn = C_n R_tn        dC_n = sum_t B_tn R_tn
    dg_te = dy_e sum_n C_n B_tn X_ten   dT_te = dy_e g_te sum_n C_n B_tn A_en X_ten
    dA_en = sum_t dy_e g_te T_te C_n B_tn X_ten
    du = dg delta (+ D dy at the last position)        d delta_s = sum_{t < s} dT_t + dg_s u_s

The sum of dT needs the positions in ascending order, and T is what is left of the sum of all steps, which is made
first: a second reading of delta, a tenth of the work. Subtracted exactly, T is 0 at the last position, and nothing of
the forward pass is stored but the value before the gate.

One warp walks over the positions of a row and block of channels; dA [N, BLOCK_E] stays in registers over all rows of a
program, of which there are at most PROGRAMS, so the partial sums of dA, dD and the bias stay small. R is summed across
the lanes, per block of channels. All partial sums are added up in a fixed order: no atomics.

Nodes approximate the value to about 1e-5; their own derivative for A would need more nodes and a second table, and the
derivative of the approximated function is no better a gradient than the exact one. So this serves both.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import LN2, LOG2E, load_length, sigmoid, silu, silu_grad, triton_dtype
from ._last_state_steps import load_step, sum_of_steps, two_sum

# Enough for every multiprocessor; more rows are taken one after the other.
PROGRAMS = 1024


@triton.jit(do_not_specialize=["batch", "seqlen"])
def last_state_bwd_kernel(
    dy_ptr, u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, lengths_ptr, saved_ptr,
    du_ptr, ddelta_ptr, dA_ptr, dB_ptr, dC_ptr, dD_ptr, dz_ptr, dbias_ptr,
    batch, dim, dstate, seqlen,
    stride_dy_batch, stride_dy_dim, stride_u_batch, stride_u_dim, stride_u_seqlen,
    stride_delta_batch, stride_delta_dim, stride_delta_seqlen,
    stride_B_batch, stride_B_dstate, stride_B_seqlen, stride_C_batch, stride_C_dstate, stride_z_batch, stride_z_dim,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    SOFTPLUS: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """A [dstate, dim]; du, ddelta [B, seqlen, dim]; dz [B, dim]; dB [blocks, B, seqlen, dstate];
    dC [blocks, B, dstate]; dA [programs, dstate, dim]; dD and dbias [programs, dim]; all contiguous.
    """
    pid = tl.program_id(0).to(tl.int64)
    pid_e = tl.program_id(1)
    offs_e = pid_e * BLOCK_E + tl.arange(0, BLOCK_E)
    offs_n = tl.arange(0, BLOCK_N)
    mask_e = offs_e < dim
    mask_n = offs_n < dstate
    mask_ne = mask_n[:, None] & mask_e[None, :]
    # [BLOCK_N, BLOCK_E]
    A = tl.load(A_ptr + offs_n[:, None] * dim + offs_e[None, :], mask=mask_ne, other=0.0) * LOG2E
    bias = tl.zeros([BLOCK_E], ACC)
    if HAS_BIAS:
        bias += tl.load(bias_ptr + offs_e, mask=mask_e, other=0.0).to(ACC)
    D = tl.zeros([BLOCK_E], ACC)
    if HAS_D:
        D += tl.load(D_ptr + offs_e, mask=mask_e, other=0.0).to(ACC)
    dA = tl.zeros([BLOCK_N, BLOCK_E], ACC)
    dD = tl.zeros([BLOCK_E], ACC)
    dbias = tl.zeros([BLOCK_E], ACC)
    for pid_b in range(pid, batch.to(tl.int64), tl.num_programs(0).to(tl.int64)):
        row = pid_b * dim + offs_e
        dy = tl.load(
            dy_ptr + pid_b * stride_dy_batch + offs_e.to(tl.int64) * stride_dy_dim, mask=mask_e, other=0.0
        ).to(ACC)  # fmt: skip
        if HAS_Z:
            place = pid_b * stride_z_batch + offs_e.to(tl.int64) * stride_z_dim
            z = tl.load(z_ptr + place, mask=mask_e, other=0.0).to(ACC)
            dz = dy * tl.load(saved_ptr + row, mask=mask_e, other=0.0) * silu_grad(z)
            tl.store(dz_ptr + row, dz.to(dz_ptr.dtype.element_ty), mask=mask_e)
            dy *= silu(z)
        C = tl.load(C_ptr + pid_b * stride_C_batch + offs_n * stride_C_dstate, mask=mask_n, other=0.0).to(ACC)
        length = load_length(lengths_ptr, pid_b, seqlen, HAS_LENGTHS)
        dT_sum = tl.zeros([BLOCK_E], ACC)
        dC = tl.zeros([BLOCK_N], ACC)
        u_row, B_row = u_ptr + pid_b * stride_u_batch, B_ptr + pid_b * stride_B_batch
        delta_row = delta_ptr + pid_b * stride_delta_batch
        T, rounding = sum_of_steps(
            delta_row, 0, length, offs_e, bias, dim, stride_delta_dim, stride_delta_seqlen, SOFTPLUS, BLOCK_E
        )
        dB_row = dB_ptr + (pid_e * batch.to(tl.int64) + pid_b) * seqlen * dstate + offs_n
        for i in range(length):
            t = tl.cast(i, tl.int64)
            place = t * stride_u_seqlen + offs_e.to(tl.int64) * stride_u_dim
            u = tl.load(u_row + place, mask=mask_e, other=0.0).to(ACC)
            B = tl.load(B_row + t * stride_B_seqlen + offs_n * stride_B_dstate, mask=mask_n, other=0.0).to(ACC)
            raw, delta = load_step(delta_row, t, offs_e, bias, dim, stride_delta_dim, stride_delta_seqlen, SOFTPLUS)
            T, lost = two_sum(T, -delta)
            rounding += lost
            left = T + rounding
            dyg = dy * delta * u
            decay = tl.exp2(A * left[None, :])  # [BLOCK_N, BLOCK_E]
            R = tl.sum(decay * dyg[None, :], axis=1)
            tl.store(dB_row + t * dstate, (C * R).to(dB_ptr.dtype.element_ty), mask=mask_n)
            dC += B * R
            decay *= (C * B)[:, None]
            dg = dy * tl.sum(decay, axis=0)
            ddelta = dT_sum + dg * u
            dT_sum += dyg * tl.sum(decay * A, axis=0) * LN2
            dA += decay * (dyg * left)[None, :]
            du = dg * delta
            if HAS_D:
                is_last = (t == length - 1).to(ACC)
                du += D * dy * is_last
                dD += dy * u * is_last
            if SOFTPLUS:
                ddelta *= sigmoid(raw)
            dbias += ddelta
            place = (pid_b * seqlen + t) * dim + offs_e
            tl.store(du_ptr + place, du.to(du_ptr.dtype.element_ty), mask=mask_e)
            tl.store(ddelta_ptr + place, ddelta.to(ddelta_ptr.dtype.element_ty), mask=mask_e)
        for i in range(length, seqlen):
            nothing = tl.zeros([BLOCK_E], ACC)
            place = (pid_b * seqlen + i) * dim + offs_e
            tl.store(du_ptr + place, nothing.to(du_ptr.dtype.element_ty), mask=mask_e)
            tl.store(ddelta_ptr + place, nothing.to(ddelta_ptr.dtype.element_ty), mask=mask_e)
            none = tl.zeros([BLOCK_N], ACC)
            tl.store(dB_row + tl.cast(i, tl.int64) * dstate, none.to(dB_ptr.dtype.element_ty), mask=mask_n)
        tl.store(dC_ptr + (pid_e * batch.to(tl.int64) + pid_b) * dstate + offs_n, dC, mask=mask_n)
    tl.store(dA_ptr + (pid * dstate + offs_n[:, None]) * dim + offs_e[None, :], dA, mask=mask_ne)
    if HAS_D:
        tl.store(dD_ptr + pid * dim + offs_e, dD, mask=mask_e)
    if HAS_BIAS:
        tl.store(dbias_ptr + pid * dim + offs_e, dbias, mask=mask_e)


def blocks(dim: int, dstate: int) -> dict[str, int]:
    """One warp. A and dA take 32 registers each of a lane, twice that would spill; with 16 states they take 16: a sixth
    more instructions, but 12 warps instead of 8 on a multiprocessor.
    """
    widest = 16 if dstate > 32 else 32
    return {
        "BLOCK_N": triton.next_power_of_2(dstate),
        "BLOCK_E": max(16, min(widest, triton.next_power_of_2(dim))),
        "num_warps": 1,
    }


def launch_backward(
    dy: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    lengths: Tensor | None,
    saved: Tensor,
) -> tuple[Tensor | None, ...]:
    """du, ddelta [B, L, dim]; dA (dim, dstate); dB [B, L, dstate]; dC, dD, dz, dbias, None where there is no input."""
    batch, dim, seqlen = u.shape
    dstate = A.shape[1]
    meta = blocks(dim, dstate)
    n_blocks = triton.cdiv(dim, meta["BLOCK_E"])
    programs = min(batch, PROGRAMS)
    acc = saved.dtype

    def scratch(*shape: int, dtype: torch.dtype = acc) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=u.device)

    du, ddelta = scratch(batch, seqlen, dim, dtype=u.dtype), scratch(batch, seqlen, dim, dtype=delta.dtype)
    # Without partial sums, straight in B's dtype.
    dB = scratch(n_blocks, batch, seqlen, dstate, dtype=B.dtype if n_blocks == 1 else acc)
    dC, dA = scratch(n_blocks, batch, dstate), scratch(programs, dstate, dim)
    dD, dbias = (None if x is None else scratch(programs, dim) for x in (D, delta_bias))
    dz = None if z is None else scratch(batch, dim, dtype=z.dtype)
    if batch > 0:
        last_state_bwd_kernel[(programs, n_blocks)](
            dy, u, delta, A.t().to(acc).contiguous(), B, C, None if D is None else D.contiguous(),
            z, None if delta_bias is None else delta_bias.contiguous(), lengths, saved,
            du, ddelta, dA, dB, dC, dD, dz, dbias, batch, dim, dstate, seqlen,
            *dy.stride(), *u.stride(), *delta.stride(), *B.stride(), *C.stride(),
            *((0, 0) if z is None else z.stride()),
            HAS_D=D is not None, HAS_Z=z is not None, HAS_BIAS=delta_bias is not None, HAS_LENGTHS=lengths is not None,
            SOFTPLUS=delta_softplus, ACC=triton_dtype(acc), **meta,
        )  # fmt: skip

    def over_blocks(parts: Tensor, dtype: torch.dtype) -> Tensor:
        return functools.reduce(torch.add, parts.unbind(0)).to(dtype)

    return (
        du,
        ddelta,
        dA.sum(0).t().to(A.dtype).contiguous(),
        over_blocks(dB, B.dtype),
        over_blocks(dC, C.dtype),
        None if dD is None or D is None else dD.sum(0).to(D.dtype),
        dz,
        None if dbias is None or delta_bias is None else dbias.sum(0).to(delta_bias.dtype),
    )
