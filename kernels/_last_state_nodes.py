"""The last position's closed form with the exponentials as a tensor-core product (the fit is in `_nodes.py`).

    y[e] = sum_t g_te sum_q (C_n B_tn l_q[n, e]) exp(-alpha_q T_te)        g = delta u, alpha_q = alpha_0 sqrt(2)^q

Two exponentials per position and channel; squaring gives the others. C B [BLOCK_T, N] times l_q [N, BLOCK_E] is a dot.
One program walks over the chunks of one row and block of channels, from the last one back; what it keeps between
chunks is [BLOCK_T, BLOCK_E], so that nothing is reduced on the way. The coefficients l_q stay on the chip.

* T is a dot with a triangular matrix of ones; the steps go in as two TF32 numbers, exact to 22 bits.
* C B goes in as float16, each row divided by its largest entry, which keeps float16's range out of it; float32 inputs
  take a second float16 number for the rest.

Arithmetic is float32 also where inputs are float64: the fit's error is larger.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import LOG2E, SQRT2, load_length, softplus, tf32_part
from ._last_state_output import write_output

BLOCK_T = 16


@triton.jit
def _ones_dot(ones, steps, start):
    """start + ones @ steps, for a matrix of zeros and ones."""
    leading = tf32_part(steps)
    return tl.dot(
        ones, steps - leading, tl.dot(ones, leading, start, input_precision="tf32"), input_precision="tf32"
    )  # fmt: skip


@triton.jit
def _load_tile(ptr, offs_t, offs_c, mask_c, stride_t, stride_c):
    """[BLOCK_T, columns] as float32; positions before the first one are 0."""
    place = offs_t.to(tl.int64)[:, None] * stride_t + offs_c.to(tl.int64)[None, :] * stride_c
    tile = tl.load(ptr + place, mask=(offs_t >= 0)[:, None] & mask_c[None, :], other=0.0)
    return tile.to(tl.float32)


@triton.jit
def _load_steps(ptr, offs_t, offs_e, bias, dim, stride_t, stride_e, SOFTPLUS: tl.constexpr):
    """Step sizes [BLOCK_T, BLOCK_E], 0 before the first position."""
    delta = _load_tile(ptr, offs_t, offs_e, offs_e < dim, stride_t, stride_e) + bias[None, :]
    if SOFTPLUS:
        delta = softplus(delta)
    return tl.where((offs_t >= 0)[:, None], delta, 0.0)


@triton.jit(do_not_specialize=["batch", "seqlen", "zero"])
def last_state_nodes_kernel(
    u_ptr, delta_ptr, rates_ptr, coefficients_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, lengths_ptr,
    y_ptr, saved_ptr, parts_ptr,
    batch, dim, dstate, seqlen, zero,
    stride_u_batch, stride_u_dim, stride_u_seqlen,
    stride_delta_batch, stride_delta_dim, stride_delta_seqlen,
    stride_B_batch, stride_B_dstate, stride_B_seqlen, stride_C_batch, stride_C_dstate, stride_z_batch, stride_z_dim,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    SOFTPLUS: tl.constexpr, SPLITS: tl.constexpr, LOW: tl.constexpr, NODES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """rates [dim], coefficients [NODES, dstate, dim] contiguous; `zero` is 0, which the compiler must not know."""
    pid_b = tl.program_id(0).to(tl.int64)
    pid_split = tl.program_id(2)
    offs_e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    offs_n = tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_T)  # row in a chunk
    mask_e = offs_e < dim
    mask_n = offs_n < dstate
    mask_ne = mask_n[:, None] & mask_e[None, :]
    C = tl.load(C_ptr + pid_b * stride_C_batch + offs_n * stride_C_dstate, mask=mask_n, other=0.0).to(tl.float32)
    rate = tl.load(rates_ptr + offs_e, mask=mask_e, other=0.0) * -LOG2E
    bias = tl.zeros([BLOCK_E], tl.float32)
    if HAS_BIAS:
        bias += tl.load(bias_ptr + offs_e, mask=mask_e, other=0.0).to(tl.float32)
    length = load_length(lengths_ptr, pid_b, seqlen, HAS_LENGTHS)
    u_row, B_row = u_ptr + pid_b * stride_u_batch, B_ptr + pid_b * stride_B_batch
    delta_row = delta_ptr + pid_b * stride_delta_batch
    coefficients = ()  # grown by addition: Triton knows no unpacking
    for q in tl.static_range(NODES):
        place = (q * dstate + offs_n[:, None]) * dim + offs_e[None, :]
        coefficient = tl.load(coefficients_ptr + place, mask=mask_ne, other=0.0)  # [BLOCK_N, BLOCK_E]
        coefficients = coefficients + (coefficient,)  # type: ignore[assignment]  # noqa: RUF005

    # Chunk i ends i BLOCK_T positions before the row's end. This split does chunks begin to end - 1.
    chunks = (length + BLOCK_T - 1) // BLOCK_T
    per_split = (chunks + SPLITS - 1) // SPLITS
    begin = tl.minimum(pid_split * per_split, chunks)
    end = tl.minimum(begin + per_split, chunks)
    carry = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)  # T before this chunk, in every row
    if SPLITS > 1:
        for i in range(begin):
            offs_t = length - (i + 1) * BLOCK_T + offs_r
            delta = _load_steps(delta_row, offs_t, offs_e, bias, dim, stride_delta_seqlen, stride_delta_dim, SOFTPLUS)
            carry = _ones_dot((offs_r[:, None] < offs_r[None, :] + i * zero + BLOCK_T).to(tl.float32), delta, carry)
    total = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for i in range(begin, end):
        offs_t = length - (i + 1) * BLOCK_T + offs_r
        u = _load_tile(u_row, offs_t, offs_e, mask_e, stride_u_seqlen, stride_u_dim)
        B = _load_tile(B_row, offs_t, offs_n, mask_n, stride_B_seqlen, stride_B_dstate)
        delta = _load_steps(delta_row, offs_t, offs_e, bias, dim, stride_delta_seqlen, stride_delta_dim, SOFTPLUS)
        CB = C[None, :] * B  # [BLOCK_T, BLOCK_N]
        largest = tl.max(tl.abs(CB), axis=1)
        scale = tl.where(largest < 1e-30, 1.0, largest)  # its inverse must be finite
        CB *= (1.0 / scale)[:, None]
        high = CB.to(tl.float16)
        # The offset varies in the loop, so these matrices are made anew instead of sitting in registers across it.
        columns = offs_r[None, :] + i * zero
        T = _ones_dot((offs_r[:, None] < columns).to(tl.float32), delta, carry)
        carry = _ones_dot((offs_r[:, None] < columns + BLOCK_T).to(tl.float32), delta, carry)
        exponent = T * rate[None, :]
        weights = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
        for chain in tl.static_range(2):
            power = tl.exp2(exponent) if chain == 0 else tl.exp2(exponent * SQRT2)
            for q in tl.static_range(chain, NODES, 2):
                product = tl.dot(high, coefficients[q])
                if LOW:
                    product = tl.dot((CB - high.to(tl.float32)).to(tl.float16), coefficients[q], product)
                weights += product * power
                power = power * power
        total += weights * (delta * u * scale[:, None])

    y = tl.sum(total, axis=0)
    if SPLITS > 1:
        place = (pid_split * batch.to(tl.int64) + pid_b) * dim + offs_e
        tl.store(parts_ptr + place, y, mask=mask_e)
    else:
        write_output(
            y, pid_b, length - 1, offs_e, u_ptr, D_ptr, z_ptr, y_ptr, saved_ptr, dim,
            stride_u_batch, stride_u_dim, stride_u_seqlen, stride_z_batch, stride_z_dim, HAS_D, HAS_Z,
        )  # fmt: skip


def blocks(dim: int, dstate: int) -> dict[str, int]:
    """Four warps side by side along the channels, few of them, so that the coefficients fit in registers."""
    BLOCK_N = max(16, triton.next_power_of_2(dstate))
    widest = {16: 64, 32: 32, 64: 32}[BLOCK_N]
    return {
        "BLOCK_T": BLOCK_T,
        "BLOCK_N": BLOCK_N,
        "BLOCK_E": max(32, min(widest, triton.next_power_of_2(dim))),
        "num_warps": 4,
    }
