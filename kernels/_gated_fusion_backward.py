"""The gated fusion's gradients. With M the mix, p the gates before their sigmoids and g the gradient of the Linear's
output (dy itself, or what LayerNorm makes of it):

    g = r (v - mean(v) - n mean(v n)), v = norm_weight * dy        (n the normalised row, r its scale)
    dM = g W        dtext = alpha dM [+ dp Wg, first half]        dh = beta dM [+ dp Wg, second half] [+ g]
    dW = g^T M      dalpha = sum_b dM text      dbeta = sum_b dM h
    context: dp = (dM text alpha (1 - alpha), dM h beta (1 - beta)),    dWg = dp^T cat(text, h)

Four kernels: `norm` makes g, where there is a LayerNorm; `rows` dM and what follows from it alone; for the context gate
`gate_rows` adds what comes back through the gates; `weights` makes the products over the batch, in parts. Sums over the
batch are made of one share for each block of rows, or part, which are added up in order: no atomics.

The biases' gradients, sums of g and of dp, are torch's. `weights` has those tiles, but in a loop no tile may be both an
operand of a dot and used otherwise: of such a one Triton (3.6, 3.7) keeps a buffer too few for Hopper's asynchronous
products, and while one still reads its operand the copy for a later step overwrites it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import triton_dtype
from ._gated_fusion_forward import (
    Blocks,
    Operands,
    find_text,
    load_tile,
    load_vector,
    matmul,
    store_tile,
)
from ._gather_backward import launch_gather_backward

# Tiles of a weight's gradient times parts of the batch: about one program for each multiprocessor.
PROGRAMS = 128
WEIGHT_TILE, WEIGHT_WARPS = 64, 8


@triton.jit
def gated_fusion_bwd_norm_kernel(
    dy_ptr, norm_weight_ptr, normal_ptr, scale_ptr, g_ptr, d_norm_weight_ptr, d_norm_bias_ptr,
    batch, stride_dy_batch, stride_dy_d,
    D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """g [B, D] of LayerNorm, and each block's sums over its rows [row blocks, D]."""
    pid = tl.program_id(0).to(tl.int64)
    rows = pid * BLOCK_B + tl.arange(0, BLOCK_B)
    here = rows < batch
    offs_d = tl.arange(0, BLOCK_D)
    inside = offs_d < D
    dy = load_tile(dy_ptr, rows, here, offs_d, inside, stride_dy_batch, stride_dy_d).to(ACC)
    normal = load_tile(normal_ptr, rows, here, offs_d, inside, D, 1).to(ACC)
    scale = tl.load(scale_ptr + rows, mask=here, other=0.0)
    tl.store(d_norm_weight_ptr + pid * D + offs_d, tl.sum(dy * normal, axis=0), mask=inside)
    tl.store(d_norm_bias_ptr + pid * D + offs_d, tl.sum(dy, axis=0), mask=inside)
    v = dy * load_vector(norm_weight_ptr, offs_d, inside, 1, ACC)
    g = v - (tl.sum(v, axis=1) / D)[:, None] - normal * (tl.sum(v * normal, axis=1) / D)[:, None]
    store_tile(g_ptr, rows, here, offs_d, inside, D, g * scale[:, None])


@triton.jit
def gated_fusion_bwd_rows_kernel(
    g_ptr, h_ptr, text_ptr, ids_ptr, alpha_ptr, beta_ptr, weight_ptr, gates_ptr,
    dh_ptr, d_text_ptr, dp_ptr, d_alpha_ptr, d_beta_ptr,
    batch, table_rows, stride_g_batch, stride_g_d,
    stride_h_batch, stride_h_d, stride_text_row, stride_text_d, stride_ids, stride_alpha, stride_beta,
    D: tl.constexpr, GATE: tl.constexpr, GATHER: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dh and d_text [B, D], for the context gate without what comes back through dp [B, 2 D]; for constant gates each
    block's sums over its rows [row blocks, D]."""
    pid = tl.program_id(0).to(tl.int64)
    rows = pid * BLOCK_B + tl.arange(0, BLOCK_B)
    here = rows < batch
    text_rows = find_text(ids_ptr, rows, here, table_rows, stride_ids, GATHER)
    for k0 in range(0, D, BLOCK_K):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        inside = offs_k < D
        dh = tl.zeros([BLOCK_B, BLOCK_K], ACC)  # dM
        for d0 in range(0, D, BLOCK_K):
            offs_d = d0 + tl.arange(0, BLOCK_K)
            inner = offs_d < D
            g = load_tile(g_ptr, rows, here, offs_d, inner, stride_g_batch, stride_g_d)
            w = load_tile(weight_ptr, offs_d, inner, offs_k, inside, D, 1)
            dh = matmul(g, w, dh, ACC, DOT, PRECISION)
        if GATE != "none":
            h = load_tile(h_ptr, rows, here, offs_k, inside, stride_h_batch, stride_h_d).to(ACC)
            text = load_tile(text_ptr, text_rows, here, offs_k, inside, stride_text_row, stride_text_d).to(ACC)
            d_alpha, d_beta = dh * text, dh * h
            if GATE == "context":
                alpha = load_tile(gates_ptr, rows, here, offs_k, inside, 2 * D, 1).to(ACC)
                beta = load_tile(gates_ptr, rows, here, D + offs_k, inside, 2 * D, 1).to(ACC)
                store_tile(dp_ptr, rows, here, offs_k, inside, 2 * D, d_alpha * alpha * (1.0 - alpha))
                store_tile(dp_ptr, rows, here, D + offs_k, inside, 2 * D, d_beta * beta * (1.0 - beta))
            else:
                alpha = load_vector(alpha_ptr, offs_k, inside, stride_alpha, ACC)
                beta = load_vector(beta_ptr, offs_k, inside, stride_beta, ACC)
                tl.store(d_alpha_ptr + pid * D + offs_k, tl.sum(d_alpha, axis=0), mask=inside)
                tl.store(d_beta_ptr + pid * D + offs_k, tl.sum(d_beta, axis=0), mask=inside)
            store_tile(d_text_ptr, rows, here, offs_k, inside, D, alpha * dh)
            dh = beta * dh
        if RESIDUAL:
            dh += load_tile(g_ptr, rows, here, offs_k, inside, stride_g_batch, stride_g_d).to(ACC)
        store_tile(dh_ptr, rows, here, offs_k, inside, D, dh)


@triton.jit
def gated_fusion_bwd_gate_rows_kernel(
    dp_ptr, gate_weight_ptr, direct_ptr, d_text_ptr, dh_ptr,
    batch, D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d_text and dh [B, D], one tile of one of them: direct [2, B, D], what `rows` gave, plus what the gates give."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    here = rows < batch
    cols = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = cols < D
    second = tl.program_id(2)
    total = load_tile(direct_ptr + second.to(tl.int64) * batch * D, rows, here, cols, inside, D, 1)
    for k0 in range(0, D, BLOCK_K):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        inner = offs_k < D
        for half in tl.static_range(2):
            dp = load_tile(dp_ptr, rows, here, half * D + offs_k, inner, 2 * D, 1)
            w = load_tile(gate_weight_ptr, half * D + offs_k, inner, second * D + cols, inside, 2 * D, 1)
            total = matmul(dp, w, total, ACC, DOT, PRECISION)
    if second == 0:
        store_tile(d_text_ptr, rows, here, cols, inside, D, total)
    else:
        store_tile(dh_ptr, rows, here, cols, inside, D, total)


@triton.jit
def gated_fusion_bwd_weights_kernel(
    left_ptr, h_ptr, text_ptr, ids_ptr, alpha_ptr, beta_ptr, gates_ptr, d_weight_ptr,
    batch, table_rows, part_rows, outputs, stride_left_batch, stride_left_d,
    stride_h_batch, stride_h_d, stride_text_row, stride_text_d, stride_ids, stride_alpha, stride_beta,
    D: tl.constexpr, RIGHT: tl.constexpr, GATHER: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of left^T right over one part of the batch.

    RIGHT is a gate, for the mix, to [parts, outputs, D]; or "cat", for cat(text, h), to [parts, outputs, 2 D].
    """
    tiles: tl.constexpr = (D + BLOCK_K - 1) // BLOCK_K
    pid_o, pid_i = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    part = tl.program_id(1)
    second = tl.program_id(2)
    offs_o = pid_o * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_i = pid_i * BLOCK_K + tl.arange(0, BLOCK_K)
    inside_o, inside_i = offs_o < outputs, offs_i < D
    total = tl.zeros([BLOCK_K, BLOCK_K], ACC)
    for r0 in range(0, part_rows, BLOCK_B):
        rows = part.to(tl.int64) * part_rows + r0 + tl.arange(0, BLOCK_B)
        here = rows < batch
        left = load_tile(left_ptr, rows, here, offs_o, inside_o, stride_left_batch, stride_left_d)
        if RIGHT == "none":
            right = load_tile(h_ptr, rows, here, offs_i, inside_i, stride_h_batch, stride_h_d).to(ACC)
        else:
            text_rows = find_text(ids_ptr, rows, here, table_rows, stride_ids, GATHER)
            text_here, h_here = here, here
            if RIGHT == "cat":  # one of the two, the other is not read
                text_here, h_here = here & (second == 0), here & (second == 1)
            text = load_tile(text_ptr, text_rows, text_here, offs_i, inside_i, stride_text_row, stride_text_d).to(ACC)
            right = load_tile(h_ptr, rows, h_here, offs_i, inside_i, stride_h_batch, stride_h_d).to(ACC)
            if RIGHT == "cat":
                right += text
            elif RIGHT == "context":
                alpha = load_tile(gates_ptr, rows, here, offs_i, inside_i, 2 * D, 1).to(ACC)
                right *= load_tile(gates_ptr, rows, here, D + offs_i, inside_i, 2 * D, 1).to(ACC)
                right += alpha * text
            else:
                right *= load_vector(beta_ptr, offs_i, inside_i, stride_beta, ACC)
                right += load_vector(alpha_ptr, offs_i, inside_i, stride_alpha, ACC) * text
        total = matmul(tl.trans(left), right, total, ACC, DOT, PRECISION)
    inputs: tl.constexpr = 2 * D if RIGHT == "cat" else D
    place = part.to(tl.int64) * outputs + offs_o
    store_tile(d_weight_ptr, place, inside_o, second * D + offs_i, inside_i, inputs, total)


def _launch_weights(left: Tensor, operands: Operands, gates: Tensor, right: str) -> tuple[Tensor, Tensor]:
    """left^T right [outputs, D or 2 D], left [B, outputs], and left's sums over the batch [outputs]."""
    batch, dim = operands.h.shape
    outputs, halves = left.shape[1], 2 if right == "cat" else 1
    arithmetic = operands.arithmetic
    block = min(WEIGHT_TILE, triton.next_power_of_2(max(16, dim)))
    tiles = triton.cdiv(outputs, block) * triton.cdiv(dim, block)
    rows = 64 if arithmetic.dot.itemsize == 2 else 32  # at a time; 64 of float32 spill
    row_blocks = triton.cdiv(batch, rows)
    part_blocks = max(1, triton.cdiv(row_blocks, max(1, PROGRAMS // (tiles * halves))))
    parts = triton.cdiv(row_blocks, part_blocks)
    d_weight = left.new_empty(parts, outputs, halves * dim, dtype=arithmetic.acc)
    gated_fusion_bwd_weights_kernel[(tiles, parts, halves)](
        left, *operands[:5], gates, d_weight,
        batch, operands.table_rows, part_blocks * rows, outputs, *left.stride(), *operands.strides,
        D=dim, RIGHT=right, GATHER=operands.ids is not None,
        BLOCK_B=rows, BLOCK_K=block, **arithmetic.constexprs, num_warps=WEIGHT_WARPS,
    )  # fmt: skip
    return d_weight.sum(0), left.sum(0, dtype=arithmetic.acc)


def launch_backward(
    dy: Tensor,
    operands: Operands,
    gates: Tensor,
    normal: Tensor,
    scale: Tensor,
    *,
    residual: bool,
    needs_text: bool,
) -> Operands:
    """The gradients, in the operands' dtypes; None where the operand is, and the text's too unless `needs_text`."""
    operands = operands.with_contiguous_parameters()
    h, text, ids, gate, norm = operands.h, operands.text, operands.ids, operands.gate, operands.norm
    batch, dim = h.shape
    arithmetic = operands.arithmetic
    blocks = Blocks.of(dim, arithmetic.dot)
    row_blocks = triton.cdiv(batch, blocks.rows)

    def room(*shape: int, dtype: torch.dtype = arithmetic.acc, wanted: bool = True) -> Tensor:
        return h.new_empty(shape if wanted else 0, dtype=dtype)

    dh = room(batch, dim, dtype=h.dtype)
    # Rows that are still to be added up are not rounded before.
    text_dtype = text.dtype if text is not None and ids is None else arithmetic.acc
    d_text = room(batch, dim, dtype=text_dtype, wanted=text is not None)
    context = gate == "context"
    direct = room(2, batch, dim, wanted=context)
    direct_text, direct_h = direct if context else (d_text, dh)
    dp = room(batch, 2 * dim, dtype=arithmetic.dot, wanted=context)
    d_alpha, d_beta = (room(row_blocks, dim, wanted=gate == "constant") for _ in range(2))
    d_norm_weight, d_norm_bias = (room(row_blocks, dim, wanted=norm) for _ in range(2))
    g = dy
    if norm:
        g = room(batch, dim)
        gated_fusion_bwd_norm_kernel[(row_blocks,)](
            dy, operands.norm_weight, normal, scale, g, d_norm_weight, d_norm_bias, batch, *dy.stride(),
            D=dim, BLOCK_B=blocks.rows, BLOCK_D=blocks.channels, ACC=triton_dtype(arithmetic.acc),
            num_warps=blocks.num_warps,
        )  # fmt: skip
    gated_fusion_bwd_rows_kernel[(row_blocks,)](
        g, *operands[:6], gates, direct_h, direct_text, dp, d_alpha, d_beta,
        batch, operands.table_rows, *g.stride(), *operands.strides,
        D=dim, GATE=gate, GATHER=ids is not None, RESIDUAL=residual,
        BLOCK_B=blocks.rows, BLOCK_K=blocks.chunk, **arithmetic.constexprs, num_warps=blocks.num_warps,
    )  # fmt: skip
    d_weight, d_bias = _launch_weights(g, operands, gates, gate)
    d_gate_weight = d_gate_bias = None
    if context:
        gated_fusion_bwd_gate_rows_kernel[(row_blocks, triton.cdiv(dim, blocks.chunk), 2)](
            dp, operands.gate_weight, direct, d_text, dh, batch,
            D=dim, BLOCK_B=blocks.rows, BLOCK_K=blocks.chunk, **arithmetic.constexprs, num_warps=blocks.num_warps,
        )  # fmt: skip
        d_gate_weight, d_gate_bias = _launch_weights(dp, operands, gates, "cat")
    d_operand: Tensor | None = d_text
    if text is None or not needs_text:
        d_operand = None
    elif ids is not None:
        d_operand = launch_gather_backward(d_text, ids, text)

    def like(leaf: Tensor | None, total: Tensor | None) -> Tensor | None:
        if leaf is None or total is None:
            return None
        return (total.sum() if leaf.dim() == 0 else total).to(leaf.dtype)

    return Operands(
        h=dh,
        text=d_operand,
        ids=None,
        alpha=like(operands.alpha, d_alpha.sum(0)),
        beta=like(operands.beta, d_beta.sum(0)),
        weight=d_weight.to(operands.weight.dtype),
        bias=d_bias.to(operands.bias.dtype),
        gate_weight=like(operands.gate_weight, d_gate_weight),
        gate_bias=like(operands.gate_bias, d_gate_bias),
        norm_weight=like(operands.norm_weight, d_norm_weight.sum(0)),
        norm_bias=like(operands.norm_bias, d_norm_bias.sum(0)),
    )
