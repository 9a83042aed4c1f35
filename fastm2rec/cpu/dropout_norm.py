"""`dropout_norm` behind a custom op: what the kernels in `dropout_norm_kernels.py` need around them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference.dropout_norm import dropout_norm as reference
from .arrays import as_flat, scratch
from .threads import run

NUMBERS = 100_000  # that are worth a slice: about a tenth of a millisecond


def _dropout(p: float, key: int, eps: float, dtype: torch.dtype) -> tuple[Any, ...]:
    """The kernel's scalars, in the dtype that it computes in."""
    scale, small = torch.tensor([1 / (1 - p), eps], dtype=dtype).numpy()
    return key, round(p * 2**32), scale, small


@torch.library.custom_op("fastm2rec::cpu_dropout_norm", mutates_args=(), device_types="cpu")
def _forward_op(e: Tensor, lengths: Tensor, weight: Tensor, bias: Tensor, eps: float, p: float, key: int) -> Tensor:
    from . import dropout_norm_kernels as kernels

    (batch, seqlen, dim), dtype = e.shape, e.dtype
    x = torch.empty(batch, seqlen, dim, dtype=dtype)
    arrays = (as_flat(e, dtype), as_flat(lengths, torch.int64), *(as_flat(t, dtype) for t in (weight, bias, x)))
    dropout = _dropout(p, key, eps, dtype)

    def rows(first: int, last: int) -> None:
        with scratch(kernels.scratch_size(dim), dtype) as memory:
            kernels.forward(*arrays, memory, *dropout, first, last, seqlen, dim)

    run(rows, batch, max(1, NUMBERS // (seqlen * dim)))
    return x


@_forward_op.register_fake
def _(e, lengths, weight, bias, eps, p, key):
    return torch.empty_like(e, memory_format=torch.contiguous_format)


@torch.library.custom_op("fastm2rec::cpu_dropout_norm_backward", mutates_args=(), device_types="cpu")
def _backward_op(
    dx: Tensor, e: Tensor, lengths: Tensor, weight: Tensor, eps: float, p: float, key: int
) -> tuple[Tensor, Tensor, Tensor]:
    from . import dropout_norm_kernels as kernels

    (batch, seqlen, dim), dtype = e.shape, e.dtype
    groups = -(-batch // kernels.GROUP)
    de = torch.empty(batch, seqlen, dim, dtype=dtype)
    dweight, dbias = torch.empty(groups, dim, dtype=dtype), torch.empty(groups, dim, dtype=dtype)
    tensors = (weight, dx, de, dweight, dbias)
    arrays = (as_flat(e, dtype), as_flat(lengths, torch.int64), *(as_flat(t, dtype) for t in tensors))
    dropout = _dropout(p, key, eps, dtype)

    def rows(first: int, last: int) -> None:
        with scratch(kernels.scratch_size(dim), dtype) as memory:
            kernels.backward(*arrays, memory, *dropout, first, last, batch, seqlen, dim)

    run(rows, groups, max(1, NUMBERS // (seqlen * dim * kernels.GROUP)))
    return de, dweight.sum(0), dbias.sum(0)


@_backward_op.register_fake
def _(dx, e, lengths, weight, eps, p, key):
    de = torch.empty_like(e, memory_format=torch.contiguous_format)
    return de, torch.empty_like(weight), torch.empty_like(weight)


def _save(ctx, inputs, output) -> None:
    e, lengths, weight, _, *ctx.numbers = inputs
    ctx.save_for_backward(e, lengths, weight)


def _backward(ctx, dx):
    de, dweight, dbias = _backward_op(dx, *ctx.saved_tensors, *ctx.numbers)
    return de, None, dweight, dbias, None, None, None


_forward_op.register_autograd(_backward, setup_context=_save)


def dropout_norm(e: Tensor, lengths: Tensor, weight: Tensor, bias: Tensor, eps: float, dropout: float) -> Tensor:
    """As `fastm2rec.reference.dropout_norm.dropout_norm`; the dropout is drawn by a key from torch's generator.

    Where the kernel cannot run (C no multiple of 32, half precision, a compiled graph), it is the reference.
    """
    single = e.dtype == weight.dtype and e.dtype in (torch.float32, torch.float64)
    if torch.compiler.is_compiling() or e.shape[2] % 32 or not single:
        return reference(e, lengths, weight, bias, eps, dropout)
    key = int(torch.randint(2**62, ())) if dropout else 0
    return _forward_op(e, lengths, weight, bias, eps, dropout, key)
