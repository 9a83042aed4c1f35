"""The gate that mixes the last item's text into the encoder's output, its Linear, and what may follow.

    y = [LayerNorm] (W (alpha * text[ids] + beta * h) + b [+ h])

One kernel forward (`_gated_fusion_forward`): it looks the rows up in the projected text table, mixes, multiplies and
normalises, and only y reaches memory. The backward pass is two or three kernels (`_gated_fusion_backward`, with the
formulas), and two more that add up the table's gradient (`_gather_backward`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._gated_fusion_backward import launch_backward
from ._gated_fusion_forward import MAX_DIM, Operands, launch_forward, saved_like

OPERANDS = len(Operands._fields)


@torch.library.custom_op("fastm2rec::gated_fusion", mutates_args=())
def _forward_op(
    h: Tensor,
    text: Tensor | None,
    ids: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: bool,
    eps: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y [B, D], and with `save` for the backward pass the gates, the normalised rows and their scale."""
    operands = Operands(
        h, text, ids, alpha, beta, weight, bias, gate_weight, gate_bias, norm_weight, norm_bias
    )  # fmt: skip
    return launch_forward(operands, residual=residual, eps=eps, save=save)


@_forward_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    operands, save = Operands(*arguments[:OPERANDS]), arguments[-1]
    return operands.h.new_empty(operands.h.shape), *saved_like(operands, save)


@torch.library.custom_op("fastm2rec::gated_fusion_backward", mutates_args=())
def _backward_op(
    dy: Tensor,
    h: Tensor,
    text: Tensor | None,
    ids: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    gates: Tensor,
    normal: Tensor,
    scale: Tensor,
    residual: bool,
    needs_text: bool,
) -> list[Tensor]:
    """The gradients, in the order of the operands; empty where there is nothing to give."""
    operands = Operands(
        h, text, ids, alpha, beta, weight, bias, gate_weight, gate_bias, norm_weight, norm_bias
    )  # fmt: skip
    grads = launch_backward(dy, operands, gates, normal, scale, residual=residual, needs_text=needs_text)
    return [h.new_empty(0) if grad is None else grad for grad in grads]


@_backward_op.register_fake
def _(dy: Tensor, *arguments: Any) -> list[Tensor]:
    operands, needs_text = Operands(*arguments[:OPERANDS]), arguments[-1]
    given = operands._replace(ids=None, text=operands.text if needs_text else None)
    return [dy.new_empty(0) if leaf is None else leaf.new_empty(leaf.shape) for leaf in given]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *operands, ctx.residual, _, _ = inputs
    ctx.save_for_backward(*operands, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, dy: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad
    grads = _backward_op(dy, *ctx.saved_tensors, ctx.residual, needed[Operands._fields.index("text")])
    return *(grad if wanted else None for grad, wanted in zip(grads, needed, strict=False)), None, None, None


_forward_op.register_autograd(_backward, setup_context=_save)


def gated_fusion(
    h: Tensor,
    text: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    ids: Tensor | None = None,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    residual: bool = False,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-12,
) -> Tensor:
    """As `fastm2rec.reference.gated_fusion.gated_fusion`; an id outside the table reads its nearest row.

    Raises:
        ValueError: more than 4,096 channels.
    """
    if h.shape[1] > MAX_DIM:
        raise ValueError(f"h: expected at most {MAX_DIM:,} channels for the Triton kernels, got {h.shape[1]:,}")
    operands = Operands(
        h, text, ids, alpha, beta, weight, bias, gate_weight, gate_bias, norm_weight, norm_bias
    )  # fmt: skip
    save = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in operands)
    y, *_ = _forward_op(*operands, residual, eps, save)
    return y
