"""One row's scan at its last position, from item ids on: u, step sizes and B are made, used and forgotten in chunks.

    y[e] = sum_i g_ie sum_n C_n B_in exp(A_en T_ie) + D_e u_0e        g = delta u, T_i = sum of delta at i' < i

i counts kept positions from the last one back: t_i = n - 1 - stride i. A program walks over chunks of BLOCK_T of them,
so T grows from 0. One program has all channels, because B, C and the step sizes are sums over them.

* T is a dot with a triangular matrix of ones; the steps go in as two TF32 numbers, exact to 22 bits.
* P, and all weights, are read in every chunk anew: kept, they would take the registers of a second program.
* exact: one exponential per (i, e, n). The columns of C B go through a little scratch memory: from there each lane
  takes the few numbers that it needs, which a shuffle or a one-hot product would cost more.
* nodes (`_nodes.py`): two exponentials per (i, e), the others by squaring, and C B times the coefficients on tensor
  cores; C B as float16 with each row divided by its largest entry.
* The last dot of a chain sets the layout of all: it must be one that ends on [BLOCK_T, BLOCK_E].
* Splits over time: a program adds up the steps of the chunks before its own, nothing else, and writes its part of y.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import LOG2E, SQRT2, load_length, silu, softplus, tf32_part
from ._encode_last_rows import filter_columns, gathered, load_row, spectrum_of, synthesised


@triton.jit
def _ones_dot(ones, steps):
    """ones @ steps, for a matrix of zeros and ones."""
    if steps.dtype == tl.float64:
        return tl.dot(ones.to(tl.float64), steps, out_dtype=tl.float64)
    else:
        leading = tf32_part(steps)
        rest = tl.dot(ones, steps - leading, input_precision="tf32")
        return tl.dot(ones, leading, rest, input_precision="tf32")


@triton.jit
def _u(
    offs_i, columns_ptr, varying, u_ptr, ids_ptr, table_ptr, taps_ptr, conv_bias_ptr, basis_ptr, offs_r, offs_e,
    length, stride, columns, table_rows, E, stride_ids_t,
    SOURCE: tl.constexpr, TAPS: tl.constexpr, BLOCK_T: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """u at kept positions i: [BLOCK_T, BLOCK_E]; finite where there is no such position."""
    offs_t = length - 1 - offs_i * stride
    if (SOURCE == "inner") | (SOURCE == "input"):
        place = columns_ptr + varying + offs_r[:, None] * E + offs_e[None, :]
        p = tl.load(place, mask=(offs_e < E)[None, :], other=0.0)
        x = synthesised(
            p, taps_ptr + varying, basis_ptr, offs_t, offs_r, offs_e, columns, E,
            SOURCE == "inner", TAPS, ACC, PRECISION,
        )  # fmt: skip
    else:
        # The identity times rows gives the tile the layout of all other dots; without it, work is replicated.
        same = (tl.arange(0, BLOCK_T)[:, None] + varying == tl.arange(0, BLOCK_T)[None, :]).to(DOT)
        if SOURCE == "given":
            inside = (offs_t >= 0)[:, None] & (offs_e < E)[None, :]
            rows = tl.load(u_ptr + offs_i[:, None] * E + offs_e[None, :], mask=inside, other=0.0)
            x = tl.dot(same, rows, input_precision=PRECISION, out_dtype=ACC)
        else:
            x = tl.zeros([BLOCK_T, offs_e.shape[0]], ACC)
            for s in tl.static_range(TAPS):
                rows = gathered(table_ptr, ids_ptr, offs_t - s, offs_e, length, table_rows, E, stride_ids_t, DOT)
                w = load_row(taps_ptr + varying + s * E, offs_e, E, ACC)
                x += w[None, :] * tl.dot(same, rows, input_precision=PRECISION, out_dtype=ACC)
    if (SOURCE == "input") | (SOURCE == "none"):
        x += load_row(conv_bias_ptr + varying, offs_e, E, ACC)[None, :]
    return x if SOURCE == "given" else silu(x)


@triton.jit
def _steps(
    u, real, step_down_ptr, step_up_ptr, step_bias_ptr, offs_e, varying, E, RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """delta [BLOCK_T, BLOCK_E], 0 where not `real`."""
    offs_k = tl.arange(0, BLOCK_RANK)
    inside = (offs_e < E)[:, None] & (offs_k < RANK)[None, :]
    down = tl.load(step_down_ptr + varying + offs_e[:, None] * RANK + offs_k[None, :], mask=inside, other=0.0)
    inside = (offs_k < RANK)[:, None] & (offs_e < E)[None, :]
    up = tl.load(step_up_ptr + varying + offs_k[:, None] * E + offs_e[None, :], mask=inside, other=0.0)
    low_rank = tl.dot(u.to(DOT), down, input_precision=PRECISION, out_dtype=u.dtype)
    raw = tl.dot(low_rank.to(DOT), up, input_precision=PRECISION, out_dtype=u.dtype)
    raw += load_row(step_bias_ptr + varying, offs_e, E, u.dtype)[None, :]
    return tl.where(real[:, None], softplus(raw), 0.0)


@triton.jit
def _weights_exact(CB, T, A_ptr, scratch_ptr, offs_r, offs_n, offs_e, varying, E, dstate: tl.constexpr):
    """sum_n CB[i, n] exp(A[n, e] T[i, e]): [BLOCK_T, BLOCK_E]."""
    BLOCK_T: tl.constexpr = T.shape[0]
    tl.store(scratch_ptr + offs_n[None, :] * BLOCK_T + offs_r[:, None], CB, mask=(offs_n < dstate)[None, :])
    tl.debug_barrier()
    T *= LOG2E
    weights = tl.zeros([T.shape[0], T.shape[1]], T.dtype)
    for n in tl.static_range(dstate):
        A = load_row(A_ptr + varying + n * E, offs_e, E, T.dtype)
        column = tl.load(scratch_ptr + n * BLOCK_T + offs_r)
        weights += column[:, None] * tl.exp2(T * A[None, :])
    return weights


@triton.jit
def _weights_nodes(CB, T, rate, coefficients, NODES: tl.constexpr):
    """The same through nodes; arithmetic is float32."""
    largest = tl.max(tl.abs(CB), axis=1)
    CB *= (1.0 / tl.where(largest == 0.0, 1.0, largest))[:, None]
    CB = CB.to(tl.float16)
    exponent = T * rate[None, :]
    weights = tl.zeros([T.shape[0], T.shape[1]], T.dtype)
    for chain in tl.static_range(2):
        power = tl.exp2(exponent) if chain == 0 else tl.exp2(exponent * SQRT2)
        for q in tl.static_range(chain, NODES, 2):
            weights += tl.dot(CB, coefficients[q]) * power
            power = power * power
    return weights * largest[:, None]


@triton.jit(do_not_specialize=["seqlen", "slots", "kept_slots", "zero", "table_rows"])
def encode_last_scan_kernel(
    ids_ptr, lengths_ptr, u_ptr, table_ptr, taps_ptr, conv_bias_ptr, basis_ptr, gain_ptr, offset_ptr,
    step_down_ptr, step_up_ptr, step_bias_ptr, B_ptr, C_ptr, A_ptr, D_ptr, rates_ptr, coefficients_ptr,
    parts_ptr, scratch_ptr, columns_ptr,
    seqlen, slots, kept_slots, stride, zero, table_rows, E: tl.constexpr, dstate: tl.constexpr, RANK: tl.constexpr,
    stride_ids_b, stride_ids_t,
    SOURCE: tl.constexpr, PER_LENGTH: tl.constexpr, TAPS: tl.constexpr, SPLITS: tl.constexpr,
    NODES: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_RANK: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """parts [SPLITS, B, E]; scratch [B, SPLITS, 2, dstate, BLOCK_T]; `zero` is 0, which the compiler must not know."""
    pid_b = tl.program_id(0).to(tl.int64)
    pid_split = tl.program_id(1)
    offs_e = tl.arange(0, BLOCK_E)
    offs_n = tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_T)
    offs_column = tl.arange(0, BLOCK_R)
    mask_en = (offs_e < E)[:, None] & (offs_n < dstate)[None, :]
    length = load_length(lengths_ptr, pid_b, seqlen, True)
    ids_ptr += pid_b * stride_ids_b
    scratch_ptr += (pid_b * SPLITS + pid_split) * (2 * dstate * BLOCK_T)
    if SOURCE == "given":
        u_ptr += pid_b * kept_slots * E
    if (SOURCE == "inner") | (SOURCE == "input"):
        spectrum = spectrum_of(length, PER_LENGTH)
        basis_ptr += spectrum * slots * BLOCK_R
        p = filter_columns(
            table_ptr, ids_ptr, taps_ptr, conv_bias_ptr, basis_ptr, gain_ptr, offset_ptr, spectrum, 0, offs_e,
            length, slots, BLOCK_R, table_rows, E, stride_ids_t,
            SOURCE == "inner", TAPS, BLOCK_L, BLOCK_R, BLOCK_E, ACC, DOT, PRECISION,
        )  # fmt: skip
        columns_ptr += (pid_b * SPLITS + pid_split) * (BLOCK_R * E)
        tl.store(columns_ptr + offs_column[:, None] * E + offs_e[None, :], p, mask=(offs_e < E)[None, :])
        tl.debug_barrier()

    # C at the last position. Elementwise: a small dot here would set the layout of those in the loop.
    u = _u(
        offs_r, columns_ptr, 0, u_ptr, ids_ptr, table_ptr, taps_ptr, conv_bias_ptr, basis_ptr, offs_column, offs_e,
        length, stride, BLOCK_R, table_rows, E, stride_ids_t, SOURCE, TAPS, BLOCK_T, ACC, DOT, PRECISION,
    )  # fmt: skip
    u = tl.where((offs_r == 0)[:, None], u, 0.0)
    u_last = tl.sum(u, axis=0)
    # The skip connection goes in here, so that u_last need not be kept.
    total = tl.where(pid_split == 0, load_row(D_ptr, offs_e, E, ACC)[None, :] * u, 0.0)
    C_weight = tl.load(C_ptr + offs_e[:, None] * dstate + offs_n[None, :], mask=mask_en, other=0.0)
    C = tl.sum(u_last[:, None] * C_weight.to(ACC), axis=0)  # [BLOCK_N]

    kept = (length - 1) // stride + 1
    chunks = (kept + BLOCK_T - 1) // BLOCK_T
    per_split = (chunks + SPLITS - 1) // SPLITS
    begin = tl.minimum(pid_split * per_split, chunks)
    end = tl.minimum(begin + per_split, chunks)
    carry = tl.zeros([BLOCK_E], ACC)
    if SPLITS > 1:
        before = tl.zeros([BLOCK_T, BLOCK_E], ACC)
        for chunk in range(begin):
            offs_i = chunk * BLOCK_T + offs_r
            u = _u(
                offs_i, columns_ptr, chunk * zero * 16, u_ptr, ids_ptr, table_ptr, taps_ptr, conv_bias_ptr, basis_ptr,
                offs_column, offs_e,
                length, stride, BLOCK_R, table_rows, E, stride_ids_t, SOURCE, TAPS, BLOCK_T, ACC, DOT, PRECISION,
            )  # fmt: skip
            before += _steps(
                u, offs_i < kept, step_down_ptr, step_up_ptr, step_bias_ptr, offs_e, chunk * zero * 16, E, RANK,
                BLOCK_RANK, DOT, PRECISION,
            )  # fmt: skip
        carry += tl.sum(before, axis=0)
    coefficients = ()  # grown by addition: Triton knows no unpacking
    rate = tl.zeros([BLOCK_E], ACC)
    if NODES > 0:
        rate += load_row(rates_ptr, offs_e, E, ACC) * -LOG2E
        mask_ne = (offs_n < dstate)[:, None] & (offs_e < E)[None, :]
        for q in tl.static_range(NODES):
            place = (q * dstate + offs_n[:, None]) * E + offs_e[None, :]
            coefficient = tl.load(coefficients_ptr + place, mask=mask_ne, other=0.0)
            coefficients = coefficients + (coefficient,)  # type: ignore[assignment]  # noqa: RUF005
    for chunk in range(begin, end):
        offs_i = chunk * BLOCK_T + offs_r
        # Loads at an offset that varies are made in the loop, instead of sitting in registers across it.
        varying = chunk * zero * 16
        u = _u(
            offs_i, columns_ptr, varying, u_ptr, ids_ptr, table_ptr, taps_ptr, conv_bias_ptr, basis_ptr,
            offs_column, offs_e,
            length, stride, BLOCK_R, table_rows, E, stride_ids_t, SOURCE, TAPS, BLOCK_T, ACC, DOT, PRECISION,
        )  # fmt: skip
        delta = _steps(
            u, offs_i < kept, step_down_ptr, step_up_ptr, step_bias_ptr, offs_e, varying, E, RANK,
            BLOCK_RANK, DOT, PRECISION,
        )  # fmt: skip
        B_weight = tl.load(B_ptr + varying + offs_e[:, None] * dstate + offs_n[None, :], mask=mask_en, other=0.0)
        CB = tl.dot(u.to(DOT), B_weight, input_precision=PRECISION, out_dtype=ACC) * C[None, :]
        behind = offs_r[None, :] + varying
        T = carry[None, :] + _ones_dot((offs_r[:, None] > behind).to(tl.float32), delta)
        carry += tl.sum(delta, axis=0)
        if NODES > 0:
            weights = _weights_nodes(CB, T, rate, coefficients, NODES)
        else:
            # Two places in turn: with one, a second barrier would have to keep the next chunk from overtaking.
            place = scratch_ptr + (chunk % 2) * (dstate * BLOCK_T)
            weights = _weights_exact(CB, T, A_ptr, place, offs_r, offs_n, offs_e, varying, E, dstate)
        total += weights * (delta * u)

    y = tl.sum(total, axis=0)
    place = (pid_split * tl.num_programs(0).to(tl.int64) + pid_b) * E + offs_e
    tl.store(parts_ptr + place, y, mask=offs_e < E)
