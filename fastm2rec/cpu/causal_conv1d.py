"""`causal_conv1d` behind a custom op: what the kernels need around them."""

from __future__ import annotations

import torch
from torch import Tensor

from .arrays import as_flat
from .products import whole_lanes
from .threads import run

SLICE = 100_000  # channels at a position: about a tenth of a millisecond


def _prepared(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, L, E], the taps [J, E] and the bias [E] in the dtype of the arithmetic, E padded to whole Lanes."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    bias = torch.zeros(weight.shape[0]) if bias is None else bias
    x, taps, bias = (whole_lanes(t.to(dtype)) for t in (x.transpose(1, 2), weight.t()[None], bias[None, None]))
    return x, taps, bias


@torch.library.custom_op("fastm2rec::cpu_causal_conv1d", mutates_args=(), device_types="cpu")
def _forward_op(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    from . import causal_conv1d_kernels as kernels

    inputs = _prepared(x, weight, bias)
    (batch, seqlen, dim), dtype = inputs[0].shape, inputs[0].dtype
    y = torch.empty(batch, seqlen, dim, dtype=dtype)
    arrays = (as_flat(t, dtype) for t in (*inputs, y))
    run(kernels.forward, (*arrays, seqlen, weight.shape[1], dim, silu), batch, _grain(seqlen, dim), 0, dtype)
    return y[..., : x.shape[1]].to(x.dtype).contiguous()


def _grain(seqlen: int, dim: int) -> int:
    return max(1, SLICE // (seqlen * dim))


@_forward_op.register_fake
def _(x, weight, bias, silu):
    batch, dim, seqlen = x.shape
    return x.new_empty(batch, seqlen, dim)


@torch.library.custom_op("fastm2rec::cpu_causal_conv1d_backward", mutates_args=(), device_types="cpu")
def _backward_op(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, as [B, L, E], of weight, and of a bias; dy is (B, E, L), as x is."""
    from . import causal_conv1d_kernels as kernels

    inputs = _prepared(x, weight, bias)
    (batch, seqlen, dim), dtype, width = inputs[0].shape, inputs[0].dtype, weight.shape[1]
    groups = -(-batch // kernels.GROUP)
    dx = torch.empty(batch, seqlen, dim, dtype=dtype)
    sums = torch.empty(groups, width + 1, dim, dtype=dtype)
    arrays = (as_flat(t, dtype) for t in (inputs[0], whole_lanes(dy.transpose(1, 2).to(dtype)), *inputs[1:], dx, sums))
    arguments = (*arrays, batch, seqlen, width, dim, silu)
    grain = max(1, _grain(seqlen, dim) // kernels.GROUP)
    run(kernels.backward, arguments, groups, grain, kernels.backward_scratch(seqlen, width), dtype)
    sums = sums.sum(dim=0)[:, : x.shape[1]]
    dbias = sums[width].to(weight.dtype if bias is None else bias.dtype, copy=True)
    return dx[..., : x.shape[1]].to(x.dtype).contiguous(), sums[:width].t().to(weight.dtype).contiguous(), dbias


@_backward_op.register_fake
def _(dy, x, weight, bias, silu):
    batch, dim, seqlen = x.shape
    return (
        x.new_empty(batch, seqlen, dim),
        weight.new_empty(weight.shape),
        (weight if bias is None else bias).new_empty(dim),
    )


def _save(ctx, inputs, output) -> None:
    x, weight, bias, ctx.silu = inputs
    ctx.save_for_backward(x, weight, bias)


def _backward(ctx, dy):
    x, weight, bias = ctx.saved_tensors
    dx, dweight, dbias = _backward_op(dy.transpose(1, 2), x, weight, bias, ctx.silu)
    return dx.transpose(1, 2), dweight, None if bias is None else dbias, None


_forward_op.register_autograd(_backward, setup_context=_save)


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """As `fastm2rec.reference.causal_conv1d.causal_conv1d`, on the CPU."""
    return _forward_op(x, weight, bias, activation == "silu").transpose(1, 2)
