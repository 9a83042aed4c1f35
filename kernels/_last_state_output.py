"""What becomes of a row's sum at the last position: the skip connection, the gate, and the sums of its parts.

    y = (sum + D u_last) [silu(z)]

Where a row was split over time, its parts are added up here, in a fixed order. Beside y, `saved` [B, dim] keeps the
value before the gate, which the gate's gradient needs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import load_length, silu

BLOCK_E = 128


@triton.jit
def write_output(
    total, pid_b, last, offs_e, u_ptr, D_ptr, z_ptr, y_ptr, saved_ptr, dim,
    stride_u_batch, stride_u_dim, stride_u_seqlen, stride_z_batch, stride_z_dim,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
):  # fmt: skip
    """y and `saved` of one row, from its sum over time `total` [BLOCK_E]."""
    mask_e = offs_e < dim
    if HAS_D:
        place = pid_b * stride_u_batch + last.to(tl.int64) * stride_u_seqlen + offs_e.to(tl.int64) * stride_u_dim
        u_last = tl.load(u_ptr + place, mask=mask_e, other=0.0).to(total.dtype)
        total += tl.load(D_ptr + offs_e, mask=mask_e, other=0.0).to(total.dtype) * u_last
    tl.store(saved_ptr + pid_b * dim + offs_e, total.to(saved_ptr.dtype.element_ty), mask=mask_e)
    if HAS_Z:
        place = pid_b * stride_z_batch + offs_e.to(tl.int64) * stride_z_dim
        total *= silu(tl.load(z_ptr + place, mask=mask_e, other=0.0).to(total.dtype))
    tl.store(y_ptr + pid_b * dim + offs_e, total.to(y_ptr.dtype.element_ty), mask=mask_e)


@triton.jit(do_not_specialize=["seqlen"])
def last_state_parts_kernel(
    parts_ptr, u_ptr, D_ptr, z_ptr, lengths_ptr, y_ptr, saved_ptr,
    dim, seqlen,
    stride_u_batch, stride_u_dim, stride_u_seqlen, stride_z_batch, stride_z_dim,
    SPLITS: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """parts [SPLITS, B, dim] to y; one program a row and block of channels."""
    pid_b = tl.program_id(0).to(tl.int64)
    offs_e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    total = tl.zeros([BLOCK_E], parts_ptr.dtype.element_ty)
    for split in range(SPLITS):
        place = (split * tl.num_programs(0).to(tl.int64) + pid_b) * dim + offs_e
        total += tl.load(parts_ptr + place, mask=offs_e < dim, other=0.0)
    last = load_length(lengths_ptr, pid_b, seqlen, HAS_LENGTHS) - 1
    write_output(
        total, pid_b, last, offs_e, u_ptr, D_ptr, z_ptr, y_ptr, saved_ptr, dim,
        stride_u_batch, stride_u_dim, stride_u_seqlen, stride_z_batch, stride_z_dim, HAS_D, HAS_Z,
    )  # fmt: skip
