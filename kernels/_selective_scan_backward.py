"""The selective scan, backward. With w_t = delta_t u_t, e_t = exp(delta_t A), gy_t = dy_t silu(z_t) and, from the end,

dh_t = gy_t C_t + e_{t+1} dh_{t+1}    (at the last position plus the gradient of the last state)
dC_t = sum over channels of gy_t h_t      dB_t = sum over channels of dh_t w_t
du_t = gy_t D + delta_t (dh_t . B_t)      ddelta_t = u_t (dh_t . B_t) + sum_n A dh_t e_t h_{t-1}, then through softplus
dA = sum_t delta_t dh_t e_t h_{t-1}       dz_t = dy_t (C_t . h_t + D u_t) silu'(z_t)      dD = sum_t gy_t u_t

One program walks one sequence backwards for a block of channels. States are recomputed forwards, as a recurrence run
backwards would divide by decays: a chunk starts from its checkpoint, leaves every STEPS-th state in scratch, and then
takes STEPS positions at a time, last first, whose states and decays stay in registers. So each exponential is taken
twice, and scratch sees one state in STEPS. Sums over a sequence (dA, dD, ddelta_bias) stay in registers; sums over
channels (dB, dC) leave as one partial sum per block of channels, which a second kernel adds in order: no atomics.

Unlike the forward kernel this one loads channels as vectors where it can. That makes Triton spread a channel's states
over four threads, with four channels in each, which a sum over channels wants: it would shuffle every state otherwise.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import LN2, LOG2E, sigmoid, triton_dtype
from ._selective_scan_forward import (
    CHUNK,
    block_states,
    channel_last,
    rows,
    sequence,
    state_width,
    states,
    step_size,
    strides,
)


@triton.jit
def _backward_kernel(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, delta_bias_ptr, cu_seqlens_ptr,
    checkpoints_ptr, scratch_ptr, dy_ptr, dlast_ptr,
    du_ptr, ddelta_ptr, dz_ptr, dB_ptr, dC_ptr, dA_ptr, dD_ptr, dbias_ptr, dinitial_ptr,
    seqlen, dim, width, n_positions,
    stride_u_batch, stride_u_time, stride_delta_batch, stride_delta_time,
    stride_z_batch, stride_z_time, stride_dy_batch, stride_dy_time,
    SOFTPLUS: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr, HAS_DLAST: tl.constexpr, PACKED: tl.constexpr,
    CHUNK: tl.constexpr, STEPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    pid_s = tl.program_id(0).to(tl.int64)
    pid_d = tl.program_id(1)
    row, start, length, checkpoint = sequence(pid_s, cu_seqlens_ptr, seqlen, CHUNK, PACKED)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = pid_d * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < dim
    cols, mask = offs_d[None, :], mask_d[None, :]
    state = offs_n[:, None] * width + cols  # in a [BLOCK_N, width] tensor
    offs_d = offs_d.to(tl.int64)
    size = BLOCK_N * tl.cast(width, tl.int64)

    u_ptrs = u_ptr + row * stride_u_batch + offs_d
    delta_ptrs = delta_ptr + row * stride_delta_batch + offs_d
    dy_ptrs = dy_ptr + row * stride_dy_batch + offs_d
    z_ptrs = z_ptr
    if HAS_Z:
        z_ptrs = z_ptr + row * stride_z_batch + offs_d
    first = row * seqlen + start  # in [batch * seqlen, *] tensors
    B_ptrs = B_ptr + first * BLOCK_N + offs_n
    C_ptrs = C_ptr + first * BLOCK_N + offs_n
    partial = (pid_d.to(tl.int64) * n_positions + first) * BLOCK_N + offs_n
    out = first * dim + offs_d
    scratch_n = (pid_s * (CHUNK // STEPS)) * BLOCK_N + offs_n[:, None]

    a = tl.load(A_ptr + state, mask=mask, other=0.0) * LOG2E  # [N, D]
    bias = tl.zeros([BLOCK_D], ACC)
    if HAS_BIAS:
        bias = tl.load(delta_bias_ptr + offs_d, mask=mask_d, other=0.0).to(ACC)
    skip = tl.zeros([BLOCK_D], ACC)
    if HAS_D:
        skip = tl.load(D_ptr + offs_d, mask=mask_d, other=0.0).to(ACC)
    dh = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    if HAS_DLAST:
        dh = tl.load(dlast_ptr + pid_s * size + state, mask=mask, other=0.0)
    dA = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    dD = tl.zeros([BLOCK_D], ACC)
    dbias = tl.zeros([BLOCK_D], ACC)

    n_chunks = tl.cdiv(length, CHUNK)
    for k in range(n_chunks):
        chunk = n_chunks - 1 - k
        t0 = chunk * CHUNK
        groups = tl.cdiv(tl.minimum(length - t0, CHUNK), STEPS)
        slot_n = (checkpoint + chunk) * BLOCK_N + offs_n[:, None]
        h = tl.load(checkpoints_ptr + slot_n * width + cols, mask=mask, other=0.0)
        tl.store(scratch_ptr + scratch_n * width + cols, h, mask=mask)
        for j in range(1, groups):
            for i in tl.static_range(STEPS):
                at = start + (t0 + (j - 1) * STEPS + i)
                u = tl.load(u_ptrs + at * stride_u_time, mask=mask_d, other=0.0).to(ACC)
                delta = step_size(
                    tl.load(delta_ptrs + at * stride_delta_time, mask=mask_d, other=0.0).to(ACC) + bias, SOFTPLUS
                )
                b = tl.load(B_ptrs + (at - start) * BLOCK_N)
                h = tl.exp2(delta[None, :] * a) * h + b[:, None] * (delta * u)[None, :]
            tl.store(scratch_ptr + (scratch_n + j * BLOCK_N) * width + cols, h, mask=mask)
        tl.debug_barrier()  # threads may read what others wrote

        for r in range(groups):
            j = groups - 1 - r
            t = t0 + j * STEPS
            h = tl.load(scratch_ptr + (scratch_n + j * BLOCK_N) * width + cols, mask=mask, other=0.0)
            saved: tl.tuple = ()
            for i in tl.static_range(STEPS):
                at = tl.minimum(t + i, length - 1).to(tl.int64)
                u = tl.load(u_ptrs + (start + at) * stride_u_time, mask=mask_d, other=0.0).to(ACC)
                raw = tl.load(delta_ptrs + (start + at) * stride_delta_time, mask=mask_d, other=0.0).to(ACC) + bias
                # A step of no size behind the end leaves the state as it is.
                delta = tl.where(t + i < length, step_size(raw, SOFTPLUS), 0.0)
                b = tl.load(B_ptrs + at * BLOCK_N)
                e = tl.exp2(delta[None, :] * a)
                saved = saved + ((raw, delta, e, h),)  # noqa: RUF005  (Triton does not unpack)
                h = e * h + b[:, None] * (delta * u)[None, :]
            for i in tl.static_range(STEPS - 1, -1, -1):
                here = t + i < length
                at = tl.minimum(t + i, length - 1).to(tl.int64)
                raw, delta, e, h_before = saved[i]
                # u and B come from cache again: two positions' values of everything would not fit into registers.
                u = tl.load(u_ptrs + (start + at) * stride_u_time, mask=mask_d, other=0.0).to(ACC)
                b = tl.load(B_ptrs + at * BLOCK_N)
                c = tl.load(C_ptrs + at * BLOCK_N)
                gy = tl.load(dy_ptrs + (start + at) * stride_dy_time, mask=mask_d & here, other=0.0).to(ACC)
                if HAS_Z:
                    z = tl.load(z_ptrs + (start + at) * stride_z_time, mask=mask_d, other=0.0).to(ACC)
                    s = sigmoid(z)
                    y = tl.sum(h * c[:, None], axis=0) + skip * u
                    dz = gy * y * (s * (1.0 + z * (1.0 - s)))
                    tl.store(dz_ptr + out + at * dim, dz.to(dz_ptr.dtype.element_ty), mask=mask_d & here)
                    gy *= z * s
                dD += gy * u
                dh += gy[None, :] * c[:, None]
                dC = tl.sum(gy[None, :] * h, axis=1)
                dB = tl.sum(dh * (delta * u)[None, :], axis=1)
                tl.store(dC_ptr + partial + at * BLOCK_N, dC, mask=here)
                tl.store(dB_ptr + partial + at * BLOCK_N, dB, mask=here)
                dw = tl.sum(dh * b[:, None], axis=0)
                du = gy * skip + delta * dw
                tl.store(du_ptr + out + at * dim, du.to(du_ptr.dtype.element_ty), mask=mask_d & here)
                dh *= e
                dexponent = dh * h_before  # [N, D]
                h = h_before
                dA += dexponent * delta[None, :]
                ddelta = u * dw + tl.sum(dexponent * a, axis=0) * LN2
                if SOFTPLUS:
                    ddelta *= sigmoid(raw)
                ddelta = tl.where(here, ddelta, 0.0)
                dbias += ddelta
                tl.store(ddelta_ptr + out + at * dim, ddelta.to(ddelta_ptr.dtype.element_ty), mask=mask_d & here)
        tl.debug_barrier()  # before the next chunk's states take their place

    tl.store(dA_ptr + pid_s * size + state, dA, mask=mask)
    if HAS_D:
        tl.store(dD_ptr + pid_s * dim + offs_d, dD, mask=mask_d)
    if HAS_BIAS:
        tl.store(dbias_ptr + pid_s * dim + offs_d, dbias, mask=mask_d)
    if HAS_INITIAL:
        tl.store(dinitial_ptr + pid_s * size + state, dh, mask=mask)


@triton.jit
def _sum_blocks_kernel(
    partial_ptr, out_ptr, n_positions, dstate, n_blocks, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr
):
    """out [positions, dstate] = the sum over the first axis of partial [n_blocks, positions, BLOCK_N], in order."""
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_n = tl.arange(0, BLOCK_N)
    inside = (offs_t < n_positions)[:, None]
    size = tl.cast(n_positions, tl.int64) * BLOCK_N
    offs = offs_t[:, None] * BLOCK_N + offs_n[None, :]  # [T, N]
    total = tl.load(partial_ptr + offs, mask=inside, other=0.0)
    for _ in range(1, n_blocks):
        partial_ptr += size
        total += tl.load(partial_ptr + offs, mask=inside, other=0.0)
    mask = inside & (offs_n < dstate)[None, :]
    tl.store(out_ptr + offs_t[:, None] * dstate + offs_n[None, :], total.to(out_ptr.dtype.element_ty), mask=mask)


def tile(block_n: int) -> tuple[int, int]:
    """BLOCK_D and warps: 16 elements of a state a thread at most; several such tensors are held, and addresses."""
    return (32, max(block_n // 16, 1)) if block_n <= 128 else (16, 8)


def steps(dim: int, block_n: int) -> int:
    """STEPS: 2 where registers suffice, which the addresses of channels fill that cannot be loaded as vectors."""
    return 2 if dim % 16 == 0 and block_n <= 128 else 1


def _sum_blocks(partial: Tensor, like: Tensor) -> Tensor:
    """Partial sums [blocks, batch * L, BLOCK_N] as a gradient of `like` (batch, N, L), its states side by side."""
    batch, dstate, seqlen = like.shape
    total = like.new_empty(batch, seqlen, dstate)
    block_n, block_t = partial.shape[2], max(512 // partial.shape[2], 1)
    _sum_blocks_kernel[(triton.cdiv(batch * seqlen, block_t),)](
        partial, total, batch * seqlen, dstate, partial.shape[0], BLOCK_T=block_t, BLOCK_N=block_n
    )
    return total.transpose(1, 2)


def backward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    checkpoints: Tensor,
    dy: Tensor,
    dlast_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias, initial_state, each in its dtype; empty for what is absent."""
    batch, dim, seqlen = u.shape
    dstate = A.shape[1]
    dtype = checkpoints.dtype
    block_n = block_states(dstate)
    block_d, warps = tile(block_n)
    n_sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    n_blocks = triton.cdiv(dim, block_d)

    def like(tensor: Tensor | None) -> Tensor:
        return u.new_empty(0) if tensor is None else tensor.new_empty(batch, seqlen, dim)

    def per_sequence(*shape: int) -> Tensor:
        return u.new_empty(n_sequences, *shape, dtype=dtype)

    du, ddelta, dz = like(u), like(delta), like(z)
    u, delta, dy = (channel_last(tensor, aligned=True) for tensor in (u, delta, dy))
    z = None if z is None else channel_last(z, aligned=True)
    dB, dC = (u.new_empty(n_blocks, batch * seqlen, block_n, dtype=dtype) for _ in range(2))
    width = state_width(dim)
    dA, dD, dbias = per_sequence(block_n, width), per_sequence(dim), per_sequence(dim)
    dinitial = per_sequence(block_n, width)
    scratch = per_sequence(CHUNK // steps(dim, block_n), block_n, width)
    _backward_kernel[(n_sequences, n_blocks)](
        u, delta, states(A, block_n, dtype), rows(B, block_n, dtype), rows(C, block_n, dtype),
        None if D is None else D.contiguous(), z, None if delta_bias is None else delta_bias.contiguous(),
        None if cu_seqlens is None else cu_seqlens.contiguous(),
        checkpoints, scratch, dy, None if dlast_state is None else states(dlast_state, block_n, dtype),
        du, ddelta, dz, dB, dC, dA, dD, dbias, dinitial,
        seqlen, dim, width, batch * seqlen,
        *strides(u), *strides(delta), *strides(z), *strides(dy),
        SOFTPLUS=delta_softplus, HAS_D=D is not None, HAS_Z=z is not None, HAS_BIAS=delta_bias is not None,
        HAS_INITIAL=initial_state is not None, HAS_DLAST=dlast_state is not None, PACKED=cu_seqlens is not None,
        CHUNK=CHUNK, STEPS=steps(dim, block_n), BLOCK_N=block_n, BLOCK_D=block_d, ACC=triton_dtype(dtype),
        num_warps=warps, maxnreg=255,  # left alone, ptxas may spill to have more blocks
    )  # fmt: skip

    def gradient(value: Tensor, like: Tensor | None, summed: bool = True) -> Tensor:
        """Contiguous, in the dtype of `like`; summed over sequences if asked."""
        if like is None:
            return u.new_empty(0)
        value = value.sum(dim=0) if summed else value
        return value.to(like.dtype, copy=True, memory_format=torch.contiguous_format)

    return (
        du.transpose(1, 2),
        ddelta.transpose(1, 2),
        gradient(dA[:, :dstate, :dim].transpose(1, 2), A),
        _sum_blocks(dB, B),
        _sum_blocks(dC, C),
        gradient(dD, D),
        dz if z is None else dz.transpose(1, 2),
        gradient(dbias, delta_bias),
        gradient(dinitial[:, :dstate, :dim].transpose(1, 2), initial_state, summed=False),
    )
