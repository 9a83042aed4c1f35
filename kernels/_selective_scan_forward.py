"""The selective scan, forward (arXiv 2312.00752, Algorithm 2).

delta_t = [softplus](delta_t + delta_bias)
h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t
y_t = (C_t . h_t + D u_t) [silu(z_t)]

One program walks one sequence for a block of channels, position after position: a parallel scan over time would spend
several times the instructions on each element. Its state [BLOCK_N, BLOCK_D] stays in registers, a channel's states in
one thread. A comes transposed and is scaled by log2(e) once, so that each decay is one exp2. Time goes in groups of
STEPS positions without a branch, whose loads do not wait for each other. For the backward pass the state before every
CHUNK-th position is kept as a checkpoint.

No load is masked, as a mask costs instructions at every position: indices are clamped to the last position and channel,
and the host pads states with zeros, up to BLOCK_N and to whole blocks of channels. The layout of a tile is chosen by
what is loaded and stored in it: neighbours in memory go to neighbouring lanes where their addresses are known to be
such, which a clamped one is not to Triton before 3.7, and each lane takes one where the pointer is not known to be
aligned. Else sums over states would go from lane to lane, twice the instructions and more.

Packed sequences lie one after another in a single row; sequence s is cu_seqlens[s] to cu_seqlens[s + 1].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ._common import LOG2E, compute_dtype, silu, softplus, triton_dtype

CHUNK = 32  # a multiple of both passes' STEPS; a row of 200 keeps 7 checkpoints, and 16 of a chunk's states in scratch
STEPS = 4
BLOCK_D = 32  # a warp's lanes


@triton.jit
def sequence(pid_s, cu_seqlens_ptr, seqlen, CHUNK: tl.constexpr, PACKED: tl.constexpr):
    """Of sequence pid_s: its row, its first position there, its length, and its first checkpoint."""
    if PACKED:
        # Values are not checked on a GPU; clamped ones never lead outside of the tensors.
        start = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + pid_s).to(tl.int64), 0), seqlen)
        end = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + pid_s + 1).to(tl.int64), start), seqlen)
        checkpoint = start // CHUNK + pid_s  # earlier sequences have at most that many
        return pid_s * 0, start, (end - start).to(tl.int32), checkpoint
    else:
        return pid_s, pid_s * 0, seqlen, pid_s * tl.cdiv(seqlen, CHUNK)


@triton.jit
def step_size(raw, SOFTPLUS: tl.constexpr):
    """delta from delta with its bias."""
    if SOFTPLUS:
        raw = softplus(raw)
    return raw


@triton.jit(do_not_specialize_on_alignment=["A_ptr", "initial_state_ptr", "last_state_ptr", "checkpoints_ptr"])
def _forward_kernel(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, delta_bias_ptr, initial_state_ptr, cu_seqlens_ptr,
    y_ptr, last_state_ptr, checkpoints_ptr,
    seqlen, dim, width,
    stride_u_batch, stride_u_time, stride_delta_batch, stride_delta_time, stride_z_batch, stride_z_time,
    SOFTPLUS: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr, PACKED: tl.constexpr, SAVE_LAST: tl.constexpr, SAVE_CHECKPOINTS: tl.constexpr,
    CHUNK: tl.constexpr, STEPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    pid_s = tl.program_id(0).to(tl.int64)
    row, start, length, checkpoint = sequence(pid_s, cu_seqlens_ptr, seqlen, CHUNK, PACKED)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < dim
    offs_w = offs_d  # in memory a state has whole blocks of channels
    state = offs_n[:, None] * width + offs_w[None, :]  # in a [BLOCK_N, width] tensor
    offs_d = tl.minimum(offs_d, dim - 1).to(tl.int64)
    size = BLOCK_N * tl.cast(width, tl.int64)

    u_ptrs = u_ptr + row * stride_u_batch + offs_d
    delta_ptrs = delta_ptr + row * stride_delta_batch + offs_d
    z_ptrs = z_ptr
    if HAS_Z:
        z_ptrs = z_ptr + row * stride_z_batch + offs_d
    first = row * seqlen + start  # in [batch * seqlen, *] tensors
    B_ptrs = B_ptr + first * BLOCK_N + offs_n
    C_ptrs = C_ptr + first * BLOCK_N + offs_n
    y_ptrs = y_ptr + first * dim + offs_d

    a = tl.load(A_ptr + state) * LOG2E  # [N, D]
    bias = tl.zeros([BLOCK_D], ACC)
    if HAS_BIAS:
        bias = tl.load(delta_bias_ptr + offs_d).to(ACC)
    skip = tl.zeros([BLOCK_D], ACC)
    if HAS_D:
        skip = tl.load(D_ptr + offs_d).to(ACC)
    h = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    if HAS_INITIAL:
        h = tl.load(initial_state_ptr + pid_s * size + state)

    for t in range(0, length, STEPS):
        if SAVE_CHECKPOINTS:  # noqa: SIM102  (a chained condition would not be constexpr)
            if t % CHUNK == 0:
                # Multiplied here, not hoisted out of the loop: 30 registers less.
                slot_n = (checkpoint + t // CHUNK) * BLOCK_N + offs_n[:, None]
                tl.store(checkpoints_ptr + slot_n * width + offs_w[None, :], h, mask=mask_d[None, :])
        for i in tl.static_range(STEPS):
            here = t + i < length
            at = tl.minimum(t + i, length - 1).to(tl.int64)
            u = tl.load(u_ptrs + (start + at) * stride_u_time).to(ACC)
            delta = step_size(tl.load(delta_ptrs + (start + at) * stride_delta_time).to(ACC) + bias, SOFTPLUS)
            delta = tl.where(here, delta, 0.0)  # a step of no size behind the end leaves the state as it is
            b = tl.load(B_ptrs + at * BLOCK_N)  # [N]
            c = tl.load(C_ptrs + at * BLOCK_N)
            h = tl.exp2(delta[None, :] * a) * h + b[:, None] * (delta * u)[None, :]
            y = tl.sum(h * c[:, None], axis=0) + skip * u
            if HAS_Z:
                y *= silu(tl.load(z_ptrs + (start + at) * stride_z_time).to(ACC))
            tl.store(y_ptrs + at * dim, y.to(y_ptr.dtype.element_ty), mask=mask_d & here)

    if SAVE_LAST:
        tl.store(last_state_ptr + pid_s * size + state, h, mask=mask_d[None, :])


def rows(tensor: Tensor, block_n: int, dtype: torch.dtype) -> Tensor:
    """B (batch, N, L) as [batch, L, block_n] or so: last axes swapped, zeros behind N, contiguous, in `dtype`.

    Unpacking half precision for every block of channels would take longer than one copy of these small tensors.
    """
    return F.pad(tensor.transpose(1, 2).to(dtype), (0, block_n - tensor.shape[1])).contiguous()


def states(tensor: Tensor, block_n: int, dtype: torch.dtype) -> Tensor:
    """A (dim, N) or states (S, dim, N) as [*, block_n, width]: zeros behind N and dim, contiguous, in `dtype`."""
    dim, dstate = tensor.shape[-2:]
    return F.pad(tensor.to(dtype), (0, block_n - dstate, 0, state_width(dim) - dim)).transpose(-1, -2).contiguous()


def channel_last(tensor: Tensor, aligned: bool = False) -> Tensor:
    """`tensor` (B, dim, L) or a copy with its channels side by side; `aligned`: as vectors, where dim allows it."""
    dim = tensor.shape[1]
    fits = tensor.stride(1) == 1 or dim == 1
    if aligned and dim % 16 == 0:
        fits = fits and tensor.data_ptr() % 16 == tensor.stride(0) % 16 == tensor.stride(2) % 16 == 0
    return tensor if fits else tensor.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)


def strides(tensor: Tensor | None) -> tuple[int, int]:
    """From row to row and from position to position; zeros for an absent tensor."""
    return (0, 0) if tensor is None else (tensor.stride(0), tensor.stride(2))


def n_checkpoints(batch: int, seqlen: int, cu_seqlens: Tensor | None) -> int:
    """How many states the forward pass keeps for the backward pass."""
    if cu_seqlens is None:
        return batch * -(-seqlen // CHUNK)
    return seqlen // CHUNK + cu_seqlens.shape[0] - 1


def block_states(dstate: int) -> int:
    """BLOCK_N: the states of a channel, padded to a power of two. Dynamic shapes are specialised on it."""
    return 1 << max(int(dstate) - 1, 3).bit_length()


def state_width(dim: int) -> int:
    """Channels of a state in memory: whole blocks, so that rows start aligned and no program needs a bound."""
    return -(-dim // BLOCK_D) * BLOCK_D


def n_warps(block_n: int) -> int:
    """A channel's states are in one thread up to 32, which h and A hold twice."""
    return max(block_n // 32, 1)


def registers(block_n: int) -> int | None:
    """How many a thread may have. Left alone, ptxas holds 32 states to 128 registers on sm_80 and spills."""
    return 255 if block_n >= 32 else None


def forward(
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
    save_last_state: bool,
    save_checkpoints: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, dim, L) channel-last, last states (S, dim, N) and checkpoints [*, BLOCK_N, width], empty unless saved."""
    batch, dim, seqlen = u.shape
    dstate = A.shape[1]
    dtype = compute_dtype(u, delta, A, B, C, D, z, initial_state)
    u, delta, z = channel_last(u), channel_last(delta), None if z is None else channel_last(z)
    block_n = block_states(dstate)
    n_sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    y = u.new_empty(batch, seqlen, dim)
    width = state_width(dim)
    last_state = u.new_empty(n_sequences if save_last_state else 0, block_n, width, dtype=dtype)
    slots = n_checkpoints(batch, seqlen, cu_seqlens) if save_checkpoints else 0
    # Where no kernel writes (behind dim, or a slot that no packed sequence needs) an op's output must not be arbitrary.
    checkpoints = u.new_empty(slots, block_n, width, dtype=dtype)
    if width > dim or cu_seqlens is not None:
        checkpoints.zero_()
    _forward_kernel[(n_sequences, triton.cdiv(dim, BLOCK_D))](
        u, delta, states(A, block_n, dtype), rows(B, block_n, dtype), rows(C, block_n, dtype),
        None if D is None else D.contiguous(), z, None if delta_bias is None else delta_bias.contiguous(),
        None if initial_state is None else states(initial_state, block_n, dtype),
        None if cu_seqlens is None else cu_seqlens.contiguous(),
        y, last_state, checkpoints,
        seqlen, dim, width,
        *strides(u), *strides(delta), *strides(z),
        SOFTPLUS=delta_softplus, HAS_D=D is not None, HAS_Z=z is not None, HAS_BIAS=delta_bias is not None,
        HAS_INITIAL=initial_state is not None, PACKED=cu_seqlens is not None,
        SAVE_LAST=save_last_state, SAVE_CHECKPOINTS=save_checkpoints,
        CHUNK=CHUNK, STEPS=STEPS, BLOCK_N=block_n, BLOCK_D=BLOCK_D, ACC=triton_dtype(dtype),
        num_warps=n_warps(block_n), maxnreg=registers(block_n),
    )  # fmt: skip
    return y.transpose(1, 2), last_state.transpose(1, 2)[:, :dim, :dstate], checkpoints
