"""`cross_entropy` behind a custom op: what the kernels in `cross_entropy_kernels.py` need around them.

Where nothing is traced it is a node of autograd's graph without the op, which would cost a tenth of a millisecond.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..reference.cross_entropy import cross_entropy as reference
from .arrays import as_flat, scratch
from .threads import run

# Rows whose scores are there at once, and stay as scratch: 32 MB of float32, more beyond 2^18 items.
SCORES = 2**23
LEAST_ROWS, MOST_ROWS = 32, 256
MULTIPLY_ADDS = 5_000_000  # of a slice: about a tenth of a millisecond


def _launch(
    query: Tensor, weight: Tensor, targets: Tensor, scale: float, of_query: bool, of_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`scale` times the loss, and its gradients or nothing."""
    from . import cross_entropy_kernels as kernels

    dtype, (batch, dim), items = query.dtype, query.shape, len(weight) - 1
    dquery = torch.empty((batch, dim) if of_query else (0,), dtype=dtype)
    dweight = torch.empty((items + 1, dim) if of_weight else (0,), dtype=dtype)
    dweight[:1] = 0  # no item
    inputs = as_flat(weight, dtype), as_flat(query, dtype), as_flat(targets, torch.int64)
    at_once = min(batch, MOST_ROWS, max(LEAST_ROWS, SCORES // items // LEAST_ROWS * LEAST_ROWS))
    blocks, grouped, groups = kernels.division(items)
    loss = 0.0
    with scratch(kernels.scratch_size(at_once, items, dim), dtype, "cross_entropy") as memory:
        for start in range(0, batch, at_once):
            rows = min(at_once, batch - start)
            grain = max(1, MULTIPLY_ADDS // (rows * kernels.ITEMS * dim))
            parts = memory[: groups * rows * dim]
            piece = kernels.piece(*inputs, memory[parts.size :], start, rows, items, dim)
            run(kernels.scores, (piece,), blocks, grain, 0, dtype)
            loss += kernels.normalise(piece, scale)
            if of_query or of_weight:
                arguments = (piece, parts, as_flat(dweight, dtype), scale, of_query, of_weight)
                run(kernels.gradients, arguments, groups, max(1, grain // grouped), 0, dtype)
            if of_query:
                torch.sum(torch.from_numpy(parts).view(groups, rows, dim), 0, out=dquery[start : start + rows])
    return torch.tensor(loss, dtype=dtype), dquery, dweight


_op = torch.library.custom_op("fastm2rec::cpu_cross_entropy", _launch, mutates_args=(), device_types="cpu")


@_op.register_fake
def _(query, weight, targets, scale, of_query, of_weight):
    return (
        query.new_empty(()),
        torch.empty_like(query, memory_format=torch.contiguous_format) if of_query else query.new_empty(0),
        torch.empty_like(weight, memory_format=torch.contiguous_format) if of_weight else weight.new_empty(0),
    )


def _save(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])


def _backward(ctx, dloss, *_):
    # A loss that nobody scaled needs no pass over the table's gradient. A tracer's tensor is of another type.
    whole = type(dloss) is Tensor and float(dloss) == 1
    found = (
        None if not gradient.numel() else gradient if whole else gradient * dloss for gradient in ctx.saved_tensors
    )
    return *found, None, None, None, None


_op.register_autograd(_backward, setup_context=_save)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        loss, *gradients = _launch(*inputs)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Any, ...]:
        return _backward(ctx, dloss)


def cross_entropy(query: Tensor, weight: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """As `fastm2rec.reference.cross_entropy.cross_entropy`, which it is where the kernels cannot run (D no multiple of
    32, half precision, an empty batch)."""
    if query.dtype not in (torch.float32, torch.float64) or query.shape[1] % 32 or not query.numel():
        return reference(query, weight, targets, reduction)
    graded = torch.is_grad_enabled()
    scale = 1 / len(query) if reduction == "mean" else 1.0
    inputs = query, weight, targets, scale, graded and query.requires_grad, graded and weight.requires_grad
    if torch.compiler.is_compiling() or type(query) is not Tensor:
        return _op(*inputs)[0]
    return _CrossEntropy.apply(*inputs)
