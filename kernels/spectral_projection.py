"""The low-pass filter as a low-rank projection, with the Linear, the causal convolution and SiLU folded in.

    filter(x) = V (m * (V^T x))        y = act(conv(filter(x) W^T + b)), or act(filter(conv(x W^T + b)))

V [L, R] is data, R few columns: the R rows of V^T x go through mask, W and taps, instead of L rows. The convolution
needs no algebra of its own for a basis: a delay of s positions is the basis shifted by s rows, with zeros before it.

Up to 64 columns one kernel does it all (`_spectral_fused`), more are done in stages (`_spectral_staged`) by the two
transforms (`_spectral_transforms`); the backward pass is made of the same kernels. Where many columns make the Linear
dearer on them than on positions, the filter runs alone, beside PyTorch's Linear and the convolution's own kernel.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._common import Arithmetic
from ._spectral_fused import MAX_COLUMNS, Operands
from ._spectral_staged import launch_backward, launch_forward
from .causal_conv1d import causal_conv1d


def projects_columns(seqlen: int, columns: int, channels: int, out_channels: int, conv_first: bool) -> bool:
    """Does the Linear belong on the columns, R of them, and not on the L positions?

    It is less work there while R (C C_out + L C_out - L C) < L C C_out (with the filter last, C and C_out swap). A row
    that one kernel holds is bound by memory, not by work, and always stays in one piece.
    """
    before, after = (out_channels, channels) if conv_first else (channels, out_channels)
    work = columns * (before * after + seqlen * after - seqlen * before)
    return columns <= MAX_COLUMNS or work < seqlen * before * after


def _operands(
    batch: int,
    filtered: int,
    arithmetic: Arithmetic,
    basis: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    conv_first: bool,
    silu: bool,
) -> Operands:
    """Everything with a batch axis; `filtered` is how many channels the filter sees."""
    # The dots would round the basis anyway; half of its bytes are then read.
    basis = basis.to(arithmetic.dot).contiguous().expand(batch, *basis.shape[-2:])
    if mask is not None:
        shape = (batch, basis.shape[2])
        if mask.dim() == 1 or mask.shape == shape:
            mask = mask.unsqueeze(-1)
        mask = mask.expand(*shape, filtered)
    return Operands(basis, mask, weight, bias, conv_weight, conv_bias, conv_first, silu, arithmetic)


@torch.library.custom_op("fastm2rec::spectral_projection", mutates_args=())
def _forward_op(
    x: Tensor,
    basis: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    conv_first: bool,
    silu: bool,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """y [B, L, C_out], and with `save` V^T x for the backward pass: [B, R, width with conv_first or 1, C]."""
    arithmetic = Arithmetic.of(x, basis, mask, weight, bias, conv_weight, conv_bias)
    filtered = weight.shape[0] if conv_first and weight is not None else x.shape[2]
    op = _operands(
        x.shape[0], filtered, arithmetic, basis, mask, weight, bias, conv_weight, conv_bias, conv_first, silu
    )
    return launch_forward(x, op, save=save)


@_forward_op.register_fake
def _(
    x: Tensor,
    basis: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    conv_first: bool,
    silu: bool,
    save: bool,
) -> tuple[Tensor, Tensor]:
    batch, seqlen, channels = x.shape
    out_channels = channels if weight is None else weight.shape[0]
    width = conv_weight.shape[1] if conv_first and conv_weight is not None else 1
    acc = Arithmetic.of(x, basis, mask, weight, bias, conv_weight, conv_bias).acc
    s_shape = (batch, basis.shape[-1], width, channels) if save else (0,)
    return x.new_empty(batch, seqlen, out_channels), x.new_empty(s_shape, dtype=acc)


@torch.library.custom_op("fastm2rec::spectral_projection_backward", mutates_args=())
def _backward_op(
    dy: Tensor,
    s: Tensor,
    basis: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    conv_first: bool,
    silu: bool,
    needs_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, mask, weight, bias, conv_weight and conv_bias; empty where there is nothing to give."""
    arithmetic = Arithmetic.of(dy, basis, mask, weight, bias, conv_weight, conv_bias)
    filtered = dy.shape[2] if conv_first else s.shape[3]
    op = _operands(
        dy.shape[0], filtered, arithmetic, basis, mask, weight, bias, conv_weight, conv_bias, conv_first, silu
    )
    dx, grads = launch_backward(dy, s, op, needs_mask=needs_mask)
    if mask is not None and needs_mask:
        d_gains = grads["mask"]
        axes = (0, 2) if mask.dim() == 1 else 2 if mask.shape == d_gains.shape[:2] else 0
        grads["mask"] = d_gains.sum(axes)
    leaves = {"mask": mask if needs_mask else None, "weight": weight, "bias": bias, "conv_weight": conv_weight,
              "conv_bias": conv_bias}  # fmt: skip
    d_mask, d_weight, d_bias, d_conv_weight, d_conv_bias = (
        dy.new_empty(0) if leaf is None else grads[name].to(leaf.dtype, copy=True).contiguous()
        for name, leaf in leaves.items()
    )
    return dx, d_mask, d_weight, d_bias, d_conv_weight, d_conv_bias


@_backward_op.register_fake
def _(
    dy: Tensor,
    s: Tensor,
    basis: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    conv_first: bool,
    silu: bool,
    needs_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    leaves = (mask if needs_mask else None, weight, bias, conv_weight, conv_bias)
    dx = dy.new_empty(dy.shape[0], dy.shape[1], s.shape[3])
    d_mask, d_weight, d_bias, d_conv_weight, d_conv_bias = (
        dy.new_empty(0) if leaf is None else leaf.new_empty(leaf.shape) for leaf in leaves
    )
    return dx, d_mask, d_weight, d_bias, d_conv_weight, d_conv_bias


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, *tensors, ctx.conv_first, ctx.silu, _ = inputs
    ctx.save_for_backward(output[1], *tensors)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    s, basis, *leaves = ctx.saved_tensors
    needs_mask = ctx.needs_input_grad[2]
    dx, *grads = _backward_op(dy, s, basis, *leaves, ctx.conv_first, ctx.silu, needs_mask)
    given = [grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad[2:7], strict=True)]
    return dx, None, *given, None, None, None


_forward_op.register_autograd(_backward, setup_context=_save)


def _apply(
    x: Tensor,
    basis: Tensor,
    mask: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    conv_weight: Tensor | None = None,
    conv_bias: Tensor | None = None,
    conv_first: bool = False,
    activation: str | None = None,
) -> Tensor:
    leaves = (x, mask, weight, bias, conv_weight, conv_bias)
    save = torch.is_grad_enabled() and any(leaf is not None and leaf.requires_grad for leaf in leaves)
    y, _ = _forward_op(x, basis, mask, weight, bias, conv_weight, conv_bias, conv_first, activation == "silu", save)
    return y


def _at_positions(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    activation: str | None,
) -> Tensor:
    """act(conv(x W^T + b)) without the filter: the Linear on all positions, then the convolution."""
    y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    if conv_weight is not None:
        return causal_conv1d(y.mT, conv_weight, conv_bias, activation).mT
    return F.silu(y) if activation == "silu" else y


def spectral_projection(
    x: Tensor,
    basis: Tensor,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    conv_weight: Tensor | None = None,
    conv_bias: Tensor | None = None,
    conv_first: bool = False,
    activation: str | None = None,
) -> Tensor:
    """As `fastm2rec.reference.spectral_projection.spectral_projection`; `basis` is data and gets no gradient."""
    seqlen, channels = x.shape[1:]
    columns = basis.shape[-1]
    if weight is not None and not projects_columns(seqlen, columns, channels, weight.shape[0], conv_first):
        if conv_first:
            x = _at_positions(x, weight, bias, conv_weight, conv_bias, None)
            return _apply(x, basis, mask, activation=activation)
        return _at_positions(_apply(x, basis, mask), weight, bias, conv_weight, conv_bias, activation)
    if weight is None and conv_weight is not None:
        weight = torch.eye(channels, dtype=x.dtype, device=x.device)
    return _apply(x, basis, mask, weight, bias, conv_weight, conv_bias, conv_first, activation)
