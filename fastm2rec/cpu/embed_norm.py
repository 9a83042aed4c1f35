"""`embed_norm` behind a custom op: what the kernels in `embed_norm_kernels.py` need around them.

Where nothing is traced it is a node of autograd's graph without the op, as in `cross_entropy.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..reference.embed_norm import embed_norm as reference
from .arrays import as_flat, scratch
from .threads import run

if TYPE_CHECKING:
    import numpy as np

NUMBERS = 100_000  # that are worth a slice: about a tenth of a millisecond


def _scalars(p: float, key: int, eps: float, like: np.ndarray) -> tuple[Any, ...]:
    """The kernel's, in the dtype that it computes in."""
    number = like.dtype.type
    return key, round(p * 2**32), number(1 / (1 - p)), number(eps)


def _launch_forward(
    item_ids: Tensor, lengths: Tensor, table: Tensor, weight: Tensor, bias: Tensor, eps: float, p: float, key: int
) -> tuple[Tensor, Tensor]:
    """x and the newest of it."""
    from . import embed_norm_kernels as kernels

    (batch, seqlen), dim, dtype = item_ids.shape, table.shape[1], table.dtype
    x, newest = torch.empty(batch, seqlen, dim, dtype=dtype), torch.empty(batch, dim, dtype=dtype)
    integers = (as_flat(tensor, torch.int64) for tensor in (item_ids, lengths))
    arrays = [*integers, *(as_flat(tensor, dtype) for tensor in (table, weight, bias, x, newest))]
    scalars = _scalars(p, key, eps, arrays[-1])

    grain = max(1, NUMBERS // (seqlen * dim))
    run(kernels.forward, (*arrays, *scalars, seqlen, dim), batch, grain, kernels.scratch_size(dim), dtype)
    return x, newest


def _launch_backward(
    dx: Tensor,
    dnewest: Tensor,
    item_ids: Tensor,
    lengths: Tensor,
    table: Tensor,
    weight: Tensor,
    eps: float,
    p: float,
    key: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of table, weight and bias."""
    from . import embed_norm_kernels as kernels

    (batch, seqlen), (items, dim), dtype = item_ids.shape, table.shape, table.dtype
    groups = -(-batch // kernels.GROUP)
    dtable = torch.empty(items, dim, dtype=dtype)
    dweight, dbias = torch.empty(groups, dim, dtype=dtype), torch.empty(groups, dim, dtype=dtype)
    ids, ends = as_flat(item_ids, torch.int64), as_flat(lengths, torch.int64)
    inputs = (ids, ends, *(as_flat(tensor, dtype) for tensor in (table, weight, dx, dnewest)))
    into = (as_flat(dweight, dtype), as_flat(dbias, dtype))
    scalars = _scalars(p, key, eps, into[0])
    grain = max(1, NUMBERS // (seqlen * dim * kernels.GROUP))
    with scratch(ids.size * dim, dtype, "embed_norm") as de:
        arguments = (*inputs, de, *into, *scalars, batch, seqlen, dim)
        run(kernels.backward, arguments, groups, grain, kernels.scratch_size(dim), dtype)
        starts, found = (as_flat(torch.empty(size, dtype=torch.int64), torch.int64) for size in (items + 2, ids.size))
        kernels.places(ids, ends, starts, found, batch, seqlen)
        run(kernels.gather, (de, starts, found, as_flat(dtable, dtype), dim), items, NUMBERS // dim, 0, dtype)
    return dtable, dweight.sum(0), dbias.sum(0)


_forward_op = torch.library.custom_op("fastm2rec::cpu_embed_norm", _launch_forward, mutates_args=(), device_types="cpu")


@_forward_op.register_fake
def _(item_ids, lengths, table, weight, bias, eps, p, key):
    (batch, seqlen), dim = item_ids.shape, table.shape[1]
    return table.new_empty(batch, seqlen, dim), table.new_empty(batch, dim)


_backward_op = torch.library.custom_op(
    "fastm2rec::cpu_embed_norm_backward", _launch_backward, mutates_args=(), device_types="cpu"
)


@_backward_op.register_fake
def _(dx, dnewest, item_ids, lengths, table, weight, eps, p, key):
    dtable = torch.empty_like(table, memory_format=torch.contiguous_format)
    return dtable, torch.empty_like(weight), torch.empty_like(weight)


def _save(ctx, inputs, output) -> None:
    item_ids, lengths, table, weight, _, *ctx.numbers = inputs
    ctx.save_for_backward(item_ids, lengths, table, weight)


def _backward(ctx, dx, dnewest):
    dtable, dweight, dbias = _backward_op(dx, dnewest, *ctx.saved_tensors, *ctx.numbers)
    return None, None, dtable, dweight, dbias, None, None, None


_forward_op.register_autograd(_backward, setup_context=_save)


class _EmbedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        _save(ctx, inputs, None)
        return _launch_forward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor, dnewest: Tensor) -> tuple[Any, ...]:
        gradients = _launch_backward(dx, dnewest, *ctx.saved_tensors, *ctx.numbers)
        return None, None, *gradients, None, None, None


def embed_norm(
    item_ids: Tensor, lengths: Tensor, table: Tensor, weight: Tensor, bias: Tensor, eps: float, dropout: float
) -> tuple[Tensor, Tensor]:
    """As `fastm2rec.reference.embed_norm.embed_norm`; the dropout is drawn by a key from torch's generator.

    Where the kernel cannot run (C no multiple of 32, half precision, a compiled graph), it is the reference.
    """
    single = table.dtype == weight.dtype and table.dtype in (torch.float32, torch.float64)
    if torch.compiler.is_compiling() or table.shape[1] % 32 or not single:
        return reference(item_ids, lengths, table, weight, bias, eps, dropout)
    key = int(torch.randint(2**62, ())) if dropout else 0
    apply = _EmbedNorm.apply if type(item_ids) is Tensor else _forward_op
    return apply(item_ids, lengths, table, weight, bias, eps, dropout, key)
