"""The gated fusion's forward kernel, and the tiles that it shares with the backward ones.

One program makes BLOCK_B whole rows of the result, so that LayerNorm needs no second pass. It goes over the inner axis
of the Linear in chunks of BLOCK_K channels: a chunk of the mix is made in registers, multiplied by its columns of W and
dropped. For the context gate the chunk's two gates are products of their own, over all of cat(text, h). What the
backward pass needs and cannot make again without a product is stored on request: the context gates, and for LayerNorm
the normalised rows with their scale. An id outside the text table counts as its nearest row: no program reads outside
of a tensor.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import Arithmetic, sigmoid

WIDE_CHUNK = 2**16  # bytes of W in a program, of wide rows
MAX_DIM = 4096  # of a row, which one program makes


class Blocks(NamedTuple):
    """Rows of a program, channels padded to a power of two, channels of a chunk, warps, chunks in flight."""

    rows: int
    channels: int
    chunk: int
    num_warps: int
    num_stages: int

    @staticmethod
    def of(dim: int, dot: torch.dtype) -> Blocks:
        """Not from the batch: the same row has the same bits in any. Tiles as large as fit without spilling: a float32
        product is three TF32 ones, of which each holds the halves of its operands."""
        channels = max(16, triton.next_power_of_2(dim))
        half = dot.itemsize == 2
        rows = 32 if half and channels <= 128 else 16
        chunk, num_stages = min(64 if half else 32, channels), 3
        if channels > 512:  # a chunk of W must fit into shared memory, with what the layouts change places in
            chunk, num_stages = max(16, WIDE_CHUNK // (channels * dot.itemsize)), 1
        return Blocks(rows, channels, chunk, max(4, min(16, channels // 32)), num_stages)


class Operands(NamedTuple):
    """The op's tensors, in the order of its schema; or their gradients."""

    h: Tensor
    text: Tensor | None
    ids: Tensor | None
    alpha: Tensor | None
    beta: Tensor | None
    weight: Tensor
    bias: Tensor
    gate_weight: Tensor | None
    gate_bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None

    @property
    def gate(self) -> str:
        """Two constants (numbers or vectors), two made from the context, or no text at all: the kernels' GATE."""
        if self.text is None:
            return "none"
        return "constant" if self.gate_weight is None else "context"

    @property
    def norm(self) -> bool:
        return self.norm_weight is not None

    @property
    def arithmetic(self) -> Arithmetic:
        return Arithmetic.of(*self)

    @property
    def table_rows(self) -> int:
        return 0 if self.text is None else self.text.shape[0]

    @property
    def strides(self) -> tuple[int, ...]:
        """Of h, text, ids, alpha and beta, as the kernels take them. A number has stride 0, which makes it a vector."""
        text = (0, 0) if self.text is None else self.text.stride()
        vectors = (self.ids, self.alpha, self.beta)
        return (*self.h.stride(), *text, *(0 if v is None or v.dim() == 0 else v.stride(0) for v in vectors))

    def with_contiguous_parameters(self) -> Operands:
        """The kernels take strides for activations, ids and constant gates only."""
        names = ("weight", "bias", "gate_weight", "gate_bias", "norm_weight", "norm_bias")
        given = {name: getattr(self, name) for name in names}
        return self._replace(**{name: tensor.contiguous() for name, tensor in given.items() if tensor is not None})


@triton.jit
def load_tile(x_ptr, rows, here, cols, inside, stride_row, stride_col):
    """x[rows, cols], zero where a row is not `here` or a column not `inside`: [rows, cols]."""
    place = rows.to(tl.int64)[:, None] * stride_row + cols.to(tl.int64)[None, :] * stride_col
    return tl.load(x_ptr + place, mask=here[:, None] & inside[None, :], other=0.0)


@triton.jit
def store_tile(x_ptr, rows, here, cols, inside, stride_row, value):
    """The counterpart of `load_tile`; columns lie side by side."""
    place = rows.to(tl.int64)[:, None] * stride_row + cols.to(tl.int64)[None, :]
    tl.store(x_ptr + place, value.to(x_ptr.dtype.element_ty), mask=here[:, None] & inside[None, :])


@triton.jit
def load_vector(x_ptr, cols, inside, stride, ACC: tl.constexpr):
    """x[cols] as one row: [1, cols]."""
    return tl.load(x_ptr + cols * stride, mask=inside, other=0.0).to(ACC)[None, :]


@triton.jit
def find_text(ids_ptr, rows, here, table_rows, stride_ids, GATHER: tl.constexpr):
    """Which row of the text belongs to each row of h. An id outside the table is moved into it, to its nearest row."""
    if GATHER:
        ids = tl.load(ids_ptr + rows * stride_ids, mask=here, other=0).to(tl.int64)
        return tl.minimum(tl.maximum(ids, 0), table_rows - 1)
    return rows


@triton.jit
def matmul(a, b, total, ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """total + a b."""
    return tl.dot(a.to(DOT), b.to(DOT), total, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def _context_gates(
    h_ptr, text_ptr, gate_weight_ptr, gate_bias_ptr, rows, text_rows, here, cols,
    stride_h_batch, stride_h_d, stride_text_row, stride_text_d,
    D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """alpha and beta, sigmoids of the halves of Linear(cat(text, h)), at the channels `cols`: [BLOCK_B, BLOCK_K]."""
    inside = cols < D
    alpha = tl.zeros([BLOCK_B, BLOCK_K], ACC)
    beta = tl.zeros([BLOCK_B, BLOCK_K], ACC)
    for k0 in range(0, D, BLOCK_K):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        inner = offs_k < D
        for half in tl.static_range(2):
            if half == 0:
                x = load_tile(text_ptr, text_rows, here, offs_k, inner, stride_text_row, stride_text_d)
            else:
                x = load_tile(h_ptr, rows, here, offs_k, inner, stride_h_batch, stride_h_d)
            w = load_tile(gate_weight_ptr, cols, inside, half * D + offs_k, inner, 2 * D, 1)
            alpha = matmul(x, tl.trans(w), alpha, ACC, DOT, PRECISION)
            w = load_tile(gate_weight_ptr, D + cols, inside, half * D + offs_k, inner, 2 * D, 1)
            beta = matmul(x, tl.trans(w), beta, ACC, DOT, PRECISION)
    alpha = sigmoid(alpha + load_vector(gate_bias_ptr, cols, inside, 1, ACC))
    beta = sigmoid(beta + load_vector(gate_bias_ptr, D + cols, inside, 1, ACC))
    return alpha, beta


@triton.jit
def gated_fusion_fwd_kernel(
    h_ptr, text_ptr, ids_ptr, alpha_ptr, beta_ptr, weight_ptr, bias_ptr, gate_weight_ptr, gate_bias_ptr,
    norm_weight_ptr, norm_bias_ptr, y_ptr, gates_ptr, normal_ptr, scale_ptr,
    batch, table_rows, eps,
    stride_h_batch, stride_h_d, stride_text_row, stride_text_d, stride_ids, stride_alpha, stride_beta,
    D: tl.constexpr, GATE: tl.constexpr, GATHER: tl.constexpr, RESIDUAL: tl.constexpr, NORM: tl.constexpr,
    SAVE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y [B, D]; with SAVE gates [B, 2 D] of the context, and of NORM the normalised rows [B, D] and their scale [B]."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    here = rows < batch
    text_rows = find_text(ids_ptr, rows, here, table_rows, stride_ids, GATHER)
    offs_d = tl.arange(0, BLOCK_D)
    inside = offs_d < D
    y = tl.zeros([BLOCK_B, BLOCK_D], ACC)
    for k0 in range(0, D, BLOCK_K):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        inner = offs_k < D
        if GATE == "context":
            # Rows are read once more behind the gates: kept meanwhile, they take the registers of a block.
            alpha, beta = _context_gates(
                h_ptr, text_ptr, gate_weight_ptr, gate_bias_ptr, rows, text_rows, here, offs_k,
                stride_h_batch, stride_h_d, stride_text_row, stride_text_d,
                D, BLOCK_B, BLOCK_K, ACC, DOT, PRECISION,
            )  # fmt: skip
            if SAVE:
                store_tile(gates_ptr, rows, here, offs_k, inner, 2 * D, alpha)
                store_tile(gates_ptr, rows, here, D + offs_k, inner, 2 * D, beta)
        mixed = load_tile(h_ptr, rows, here, offs_k, inner, stride_h_batch, stride_h_d).to(ACC)  # [BLOCK_B, BLOCK_K]
        if GATE != "none":
            text = load_tile(text_ptr, text_rows, here, offs_k, inner, stride_text_row, stride_text_d).to(ACC)
            if GATE == "constant":
                alpha = load_vector(alpha_ptr, offs_k, inner, stride_alpha, ACC)
                beta = load_vector(beta_ptr, offs_k, inner, stride_beta, ACC)
            mixed = alpha * text + beta * mixed
        w = load_tile(weight_ptr, offs_d, inside, offs_k, inner, D, 1)  # [BLOCK_D, BLOCK_K]
        y = matmul(mixed, tl.trans(w), y, ACC, DOT, PRECISION)
    y += load_vector(bias_ptr, offs_d, inside, 1, ACC)
    if RESIDUAL:
        y += load_tile(h_ptr, rows, here, offs_d, inside, stride_h_batch, stride_h_d).to(ACC)
    if NORM:
        centred = tl.where(inside[None, :], y - (tl.sum(y, axis=1) / D)[:, None], 0.0)
        scale = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / D + eps)  # [BLOCK_B]
        normal = centred * scale[:, None]
        if SAVE:
            tl.store(scale_ptr + rows, scale, mask=here)
            store_tile(normal_ptr, rows, here, offs_d, inside, D, normal)
        y = normal * load_vector(norm_weight_ptr, offs_d, inside, 1, ACC)
        y += load_vector(norm_bias_ptr, offs_d, inside, 1, ACC)
    store_tile(y_ptr, rows, here, offs_d, inside, D, y)


def saved_like(operands: Operands, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the gates, the normalised rows and their scale; empty what is not stored."""
    h = operands.h
    batch, dim = h.shape
    return (
        h.new_empty((batch, 2 * dim) if save and operands.gate == "context" else (0,)),
        h.new_empty((batch, dim) if save and operands.norm else (0,)),
        h.new_empty((batch,) if save and operands.norm else (0,), dtype=operands.arithmetic.acc),
    )


def launch_forward(
    operands: Operands, *, residual: bool, eps: float, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y [B, D], and what `saved_like` describes."""
    operands = operands.with_contiguous_parameters()
    batch, dim = operands.h.shape
    y = operands.h.new_empty(batch, dim)
    gates, normal, scale = saved_like(operands, save)
    blocks = Blocks.of(dim, operands.arithmetic.dot)
    gated_fusion_fwd_kernel[(triton.cdiv(batch, blocks.rows),)](
        *operands, y, gates, normal, scale, batch, operands.table_rows, eps, *operands.strides,
        D=dim, GATE=operands.gate, GATHER=operands.ids is not None, RESIDUAL=residual, NORM=operands.norm, SAVE=save,
        BLOCK_B=blocks.rows, BLOCK_D=blocks.channels, BLOCK_K=blocks.chunk, **operands.arithmetic.constexprs,
        num_warps=blocks.num_warps, num_stages=blocks.num_stages,
    )  # fmt: skip
    return y, gates, normal, scale
