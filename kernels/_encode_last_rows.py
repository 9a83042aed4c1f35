"""From item ids to the scan's input u: gathered rows, the convolution, the filter's columns, and SiLU.

    p[t] = u_table[id_t]        conv(p)[t] = sum_s w_s p[t - s] + b

    inner   P = m V^T conv(p)        u[t] = silu(V[t] P)
    input   P = m V^T p              u[t] = silu(sum_s w_s (V[t - s] P) + b)
    none                             u[t] = silu(conv(p)[t])

P [R, E] is all that the scan needs of a row. Where R is one tile the scan's program makes it itself. With more columns
two kernels, one for P and one for u, go first, and the scan reads u from memory ("given").

in_proj is not here: the tables have been multiplied by it. The bias of a convolution in front of the filter comes
through `offset`, m times the sums of the columns, so that p is zero behind the row and only n + J - 1 slots count.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import load_ids, load_length, silu


@triton.jit
def spectrum_of(length, PER_LENGTH: tl.constexpr):
    """Which of the spectra is this row's?"""
    if PER_LENGTH:
        return (length - 1).to(tl.int64)
    else:
        return (length * 0).to(tl.int64)


@triton.jit
def gathered(table_ptr, ids_ptr, offs_t, offs_e, length, table_rows, E, stride_ids_t, ACC: tl.constexpr):
    """The items' rows at positions t: [BLOCK_T, BLOCK_E]; zero outside 0..length-1, as row 0 of the table is."""
    real = (offs_t >= 0) & (offs_t < length)
    item = load_ids(ids_ptr, offs_t.to(tl.int64) * stride_ids_t, real, table_rows)
    return tl.load(table_ptr + item[:, None] * E + offs_e[None, :], mask=(offs_e < E)[None, :], other=0.0).to(ACC)


@triton.jit
def load_row(ptr, offs_e, E, ACC: tl.constexpr):
    """A vector of channels: [BLOCK_E]."""
    return tl.load(ptr + offs_e, mask=offs_e < E, other=0.0).to(ACC)


@triton.jit
def convolved(
    table_ptr, ids_ptr, taps_ptr, offs_t, offs_e, length, table_rows, E, stride_ids_t,
    TAPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """sum_s w_s p[t - s], without the bias: [BLOCK_T, BLOCK_E]."""
    w = load_row(taps_ptr, offs_e, E, ACC)
    total = w[None, :] * gathered(table_ptr, ids_ptr, offs_t, offs_e, length, table_rows, E, stride_ids_t, ACC)
    for s in tl.static_range(1, TAPS):
        w = load_row(taps_ptr + s * E, offs_e, E, ACC)
        total += w[None, :] * gathered(table_ptr, ids_ptr, offs_t - s, offs_e, length, table_rows, E, stride_ids_t, ACC)
    return total


@triton.jit
def filter_columns(
    table_ptr, ids_ptr, taps_ptr, conv_bias_ptr, basis_ptr, gain_ptr, offset_ptr, spectrum, first_column, offs_e,
    length, slots, columns, table_rows, E, stride_ids_t,
    INNER: tl.constexpr, TAPS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P of the columns first_column to first_column + BLOCK_R - 1, as dots take it: [BLOCK_R, BLOCK_E]."""
    offs_r = first_column + tl.arange(0, BLOCK_R)
    p = tl.zeros([BLOCK_R, BLOCK_E], ACC)
    end = length
    if INNER:
        end = tl.minimum(length + (TAPS - 1), slots)
    for t0 in range(0, end, BLOCK_T):
        offs_t = t0 + tl.arange(0, BLOCK_T)
        if INNER:
            x = convolved(table_ptr, ids_ptr, taps_ptr, offs_t, offs_e, length, table_rows, E, stride_ids_t, TAPS, ACC)
        else:
            x = gathered(table_ptr, ids_ptr, offs_t, offs_e, length, table_rows, E, stride_ids_t, ACC)
        # [BLOCK_R, BLOCK_T]
        place = offs_t[None, :] * columns + offs_r[:, None]
        v = tl.load(basis_ptr + place, mask=(offs_t < end)[None, :], other=0.0)
        p = tl.dot(v, x.to(DOT), p, input_precision=PRECISION, out_dtype=ACC)
    p *= tl.load(gain_ptr + spectrum * columns + offs_r).to(ACC)[:, None]
    if INNER:
        offset = tl.load(offset_ptr + spectrum * columns + offs_r).to(ACC)
        p += offset[:, None] * load_row(conv_bias_ptr, offs_e, E, ACC)[None, :]
    return p.to(DOT)


@triton.jit
def basis_rows(basis_ptr, offs_t, offs_r, columns):
    """V at positions t below L: [BLOCK_T, BLOCK_R], zero before the first one."""
    place = offs_t[:, None] * columns + offs_r[None, :]
    return tl.load(basis_ptr + place, mask=(offs_t >= 0)[:, None], other=0.0)


@triton.jit
def synthesised(
    p, taps_ptr, basis_ptr, offs_t, offs_r, offs_e, columns, E,
    INNER: tl.constexpr, TAPS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What these columns add to u before its bias and SiLU at positions t: [BLOCK_T, BLOCK_E]."""
    v = basis_rows(basis_ptr, offs_t, offs_r, columns)
    total = tl.dot(v, p, input_precision=PRECISION, out_dtype=ACC)
    if not INNER:
        total *= load_row(taps_ptr, offs_e, E, ACC)[None, :]
        for s in tl.static_range(1, TAPS):
            v = basis_rows(basis_ptr, offs_t - s, offs_r, columns)
            w = load_row(taps_ptr + s * E, offs_e, E, ACC)
            total += w[None, :] * tl.dot(v, p, input_precision=PRECISION, out_dtype=ACC)
    return total


@triton.jit(do_not_specialize=["seqlen", "slots", "table_rows"])
def columns_kernel(
    ids_ptr, lengths_ptr, table_ptr, taps_ptr, conv_bias_ptr, basis_ptr, gain_ptr, offset_ptr, p_ptr,
    seqlen, slots, columns, table_rows, E: tl.constexpr,
    stride_ids_b, stride_ids_t,
    PER_LENGTH: tl.constexpr, INNER: tl.constexpr, TAPS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P [B, columns, E]; one program a row and tile of columns."""
    pid_b = tl.program_id(0).to(tl.int64)
    first_column = tl.program_id(1) * BLOCK_R
    offs_e = tl.program_id(2) * BLOCK_E + tl.arange(0, BLOCK_E)
    length = load_length(lengths_ptr, pid_b, seqlen, True)
    spectrum = spectrum_of(length, PER_LENGTH)
    p = filter_columns(
        table_ptr, ids_ptr + pid_b * stride_ids_b, taps_ptr, conv_bias_ptr,
        basis_ptr + spectrum * slots * columns, gain_ptr, offset_ptr, spectrum, first_column, offs_e,
        length, slots, columns, table_rows, E, stride_ids_t,
        INNER, TAPS, BLOCK_T, BLOCK_R, BLOCK_E, ACC, DOT, PRECISION,
    )  # fmt: skip
    offs_r = first_column + tl.arange(0, BLOCK_R)
    place = (pid_b * columns + offs_r)[:, None] * E + offs_e[None, :]
    tl.store(p_ptr + place, p, mask=(offs_e < E)[None, :])


@triton.jit(do_not_specialize=["seqlen", "slots", "kept_slots"])
def rows_kernel(
    lengths_ptr, p_ptr, taps_ptr, conv_bias_ptr, basis_ptr, u_ptr,
    seqlen, slots, kept_slots, stride, columns, E: tl.constexpr,
    PER_LENGTH: tl.constexpr, INNER: tl.constexpr, TAPS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """u [B, kept_slots, E], from the last kept position back; one program a row, tile of positions and of channels."""
    pid_b = tl.program_id(0).to(tl.int64)
    offs_i = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_e = tl.program_id(2) * BLOCK_E + tl.arange(0, BLOCK_E)
    length = load_length(lengths_ptr, pid_b, seqlen, True)
    basis_ptr += spectrum_of(length, PER_LENGTH) * slots * columns
    offs_t = length - 1 - offs_i * stride
    total = tl.zeros([BLOCK_T, BLOCK_E], ACC)
    for first_column in range(0, columns, BLOCK_R):
        offs_r = first_column + tl.arange(0, BLOCK_R)
        place = (pid_b * columns + offs_r)[:, None] * E + offs_e[None, :]
        p = tl.load(p_ptr + place, mask=(offs_e < E)[None, :], other=0.0)
        total += synthesised(
            p, taps_ptr, basis_ptr, offs_t, offs_r, offs_e, columns, E,
            INNER, TAPS, ACC, PRECISION,
        )  # fmt: skip
    if not INNER:
        total += load_row(conv_bias_ptr, offs_e, E, ACC)[None, :]
    place = (pid_b * kept_slots + offs_i)[:, None] * E + offs_e[None, :]
    inside = ((offs_i < kept_slots) & (offs_t >= 0))[:, None] & (offs_e < E)[None, :]
    tl.store(u_ptr + place, silu(total).to(u_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["seqlen", "table_rows"])
def filtered_gate_kernel(
    ids_ptr, lengths_ptr, table_ptr, weights_ptr, z_ptr,
    seqlen, slots, table_rows, E: tl.constexpr, stride_ids_b, stride_ids_t,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """z [B, E] where the filter comes before it: z[e] = sum_t weights[n - 1, t] z_table[id_t, e]."""
    pid_b = tl.program_id(0).to(tl.int64)
    offs_e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    length = load_length(lengths_ptr, pid_b, seqlen, True)
    z = tl.zeros([BLOCK_T, BLOCK_E], ACC)
    for t0 in range(0, length, BLOCK_T):
        offs_t = t0 + tl.arange(0, BLOCK_T)
        x = gathered(
            table_ptr, ids_ptr + pid_b * stride_ids_b, offs_t, offs_e, length, table_rows, E, stride_ids_t, ACC
        )
        weight = tl.load(weights_ptr + (length - 1).to(tl.int64) * slots + offs_t, mask=offs_t < length, other=0.0)
        z += weight.to(ACC)[:, None] * x
    tl.store(z_ptr + pid_b * E + offs_e, tl.sum(z, axis=0), mask=offs_e < E)
