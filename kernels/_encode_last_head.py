"""From the scan's output to the query vectors: everything that happens once a row, in one kernel.

    y = sum of its parts [LayerNorm];  h = LayerNorm(y silu(z) out_proj);  h = LayerNorm(h + gelu(h fc1 + b) fc2 + b)
    constant:  Y = h mix + b + text_table[id]        context:  Y = (a text_table[id] + b' h) mix + b
    a, b' = sigmoid(gate_table[id] + h gate_weight)        [+ h]

A program has BLOCK_B rows of the batch; weights come out of the L2 cache, hidden units of the feed-forward network in
tiles of BLOCK_H. A row of a dot depends on that row alone, so a result does not depend on the batch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import load_ids, sigmoid, silu

SQRT_HALF = tl.constexpr(0.7071067811865476)


@triton.jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * SQRT_HALF))


@triton.jit
def _layer_norm(x, weight_ptr, bias_ptr, offs_c, columns, eps):
    """Over the second axis of x, which is 0 beyond `columns`, and so is the result."""
    inside = offs_c < columns
    mean = tl.sum(x, axis=1) / columns
    x = tl.where(inside[None, :], x - mean[:, None], 0.0)
    variance = tl.sum(x * x, axis=1) / columns
    x *= (1.0 / tl.sqrt(variance + eps))[:, None]
    weight = tl.load(weight_ptr + offs_c, mask=inside, other=0.0).to(x.dtype)
    return x * weight[None, :] + tl.load(bias_ptr + offs_c, mask=inside, other=0.0).to(x.dtype)[None, :]


@triton.jit
def _times(x, weight_ptr, offs_in, offs_out, n_in, n_out, stride, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """x @ weight[offs_in, offs_out], for a weight with rows `stride` apart and n_in by n_out entries."""
    inside = (offs_in < n_in)[:, None] & (offs_out < n_out)[None, :]
    weight = tl.load(weight_ptr + offs_in[:, None] * stride + offs_out[None, :], mask=inside, other=0.0)
    return tl.dot(x.to(DOT), weight.to(DOT), input_precision=PRECISION, out_dtype=x.dtype)


@triton.jit
def _vector(ptr, offs_c, columns, ACC: tl.constexpr):
    """[1, BLOCK]."""
    return tl.load(ptr + offs_c, mask=offs_c < columns, other=0.0).to(ACC)[None, :]


@triton.jit
def _table_rows(ptr, rows, offs_c, columns, stride, mask_b, ACC: tl.constexpr):
    """table[rows]: [BLOCK_B, BLOCK]."""
    inside = mask_b[:, None] & (offs_c < columns)[None, :]
    return tl.load(ptr + rows[:, None] * stride + offs_c[None, :], mask=inside, other=0.0).to(ACC)


@triton.jit(do_not_specialize=["seqlen", "table_rows"])
def encode_last_head_kernel(
    ids_ptr, lengths_ptr, parts_ptr, z_ptr, z_table_ptr, scan_norm_weight_ptr, scan_norm_bias_ptr, out_proj_ptr,
    norm_weight_ptr, norm_bias_ptr, fc1_ptr, fc1_bias_ptr, fc2_ptr, fc2_bias_ptr,
    ffn_norm_weight_ptr, ffn_norm_bias_ptr, mix_ptr, mix_bias_ptr, text_table_ptr, gate_weight_ptr, gate_table_ptr,
    query_ptr,
    batch, seqlen, table_rows, eps, D: tl.constexpr, E: tl.constexpr, H: tl.constexpr, stride_ids_b, stride_ids_t,
    SPLITS: tl.constexpr, HAS_Z: tl.constexpr, SCAN_NORM: tl.constexpr, GATE: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """parts [SPLITS, B, E]; z [B, E] with HAS_Z, else the last item's row of z_table; query [B, D]."""
    offs_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    offs_d = tl.arange(0, BLOCK_D)
    offs_e = tl.arange(0, BLOCK_E)
    mask_b = offs_b < batch
    last = tl.minimum(tl.maximum(tl.load(lengths_ptr + offs_b, mask=mask_b, other=1).to(tl.int64), 1), seqlen) - 1
    item = load_ids(ids_ptr, offs_b * stride_ids_b + last * stride_ids_t, mask_b, table_rows)

    y = _table_rows(parts_ptr, offs_b, offs_e, E, E, mask_b, ACC)
    for split in range(1, SPLITS):
        y += _table_rows(parts_ptr, split * batch + offs_b, offs_e, E, E, mask_b, ACC)
    if SCAN_NORM:
        y = _layer_norm(y, scan_norm_weight_ptr, scan_norm_bias_ptr, offs_e, E, eps)
    if HAS_Z:
        z = _table_rows(z_ptr, offs_b, offs_e, E, E, mask_b, ACC)
    else:
        z = _table_rows(z_table_ptr, item, offs_e, E, E, mask_b, ACC)
    h = _times(y * silu(z), out_proj_ptr, offs_e, offs_d, E, D, D, DOT, PRECISION)  # [BLOCK_B, BLOCK_D]
    h = _layer_norm(h, norm_weight_ptr, norm_bias_ptr, offs_d, D, eps)
    total = h + _vector(fc2_bias_ptr, offs_d, D, ACC)
    for first in range(0, H, BLOCK_H):
        offs_h = first + tl.arange(0, BLOCK_H)
        hidden = _times(h, fc1_ptr, offs_d, offs_h, D, H, H, DOT, PRECISION) + _vector(fc1_bias_ptr, offs_h, H, ACC)
        total += _times(_gelu(hidden), fc2_ptr, offs_h, offs_d, H, D, D, DOT, PRECISION)
    h = _layer_norm(total, ffn_norm_weight_ptr, ffn_norm_bias_ptr, offs_d, D, eps)

    query = h
    if GATE != "none":
        if GATE == "context":
            alpha = _times(h, gate_weight_ptr, offs_d, offs_d, D, D, 2 * D, DOT, PRECISION)
            alpha += _table_rows(gate_table_ptr, item, offs_d, D, 2 * D, mask_b, ACC)
            beta = _times(h, gate_weight_ptr + D, offs_d, offs_d, D, D, 2 * D, DOT, PRECISION)
            beta += _table_rows(gate_table_ptr + D, item, offs_d, D, 2 * D, mask_b, ACC)
            text = _table_rows(text_table_ptr, item, offs_d, D, D, mask_b, ACC)
            query = sigmoid(alpha) * text + sigmoid(beta) * h
        query = _times(query, mix_ptr, offs_d, offs_d, D, D, D, DOT, PRECISION) + _vector(mix_bias_ptr, offs_d, D, ACC)
        if GATE == "constant":
            query += _table_rows(text_table_ptr, item, offs_d, D, D, mask_b, ACC)
        if RESIDUAL:
            query += h
    inside = mask_b[:, None] & (offs_d < D)[None, :]
    tl.store(query_ptr + offs_b[:, None] * D + offs_d[None, :], query.to(query_ptr.dtype.element_ty), mask=inside)
