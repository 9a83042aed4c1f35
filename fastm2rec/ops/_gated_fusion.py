"""The learned mix of sequence and text."""

from __future__ import annotations

import torch
from torch import Tensor

from .._values import extremes, readable
from ..impl import AUTO, resolve
from ._checks import expect_alike, expect_shape


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
    impl: str = AUTO,
) -> Tensor:
    """The learned mix of sequence and text: `Y = (alpha * text + beta * h) W^T + b [+ h]` (arXiv 2505.04445 Eq. 16).

    Args:
        h: E_m, [B, D], the encoder's output.
        text: E_l, the projected text of each row's last item, [B, D], or with `ids` the projected text of all items,
            [n_rows, D], of which the rows are looked up inside; None leaves the text out (the control).
        alpha: [] or [D], the weight of the text; None for the context gate.
        beta: [] or [D], the weight of h; None for the context gate.
        weight: [D, D], as in `torch.nn.Linear`.
        bias: [D].
        ids: [B] int32 or int64, 0 to n_rows - 1: the row of `text` that belongs to each row of h.
        gate_weight: [2 D, 2 D] for the context gate: `alpha, beta = sigmoid(cat(text, h) Wg^T + bg)`.
        gate_bias: [2 D].
        residual: add h.
        norm_weight: [D], for a LayerNorm of the result, after the residual.
        norm_bias: [D]; both or neither.
        eps: of the LayerNorm.
        impl: which implementation.

    Returns:
        [B, D], dtype of h.

    Raises:
        TypeError, ValueError: a tensor of the wrong dtype, device or shape, gates that contradict each other, or ids
            out of range (checked on a GPU with FASTM2REC_CHECK=1 only, and not in compiled graphs; Triton's kernel
            takes the nearest row otherwise). The Triton kernels take D up to 4,096, and are made for up to 512.
        ImplementationError: `impl` cannot run here.
    """
    expect_alike("h", h, {"text": text, "alpha": alpha, "beta": beta, "weight": weight, "bias": bias,
                           "gate_weight": gate_weight, "gate_bias": gate_bias, "norm_weight": norm_weight,
                           "norm_bias": norm_bias})  # fmt: skip
    sizes: dict[str, int] = {}
    expect_shape("h", h, ("B", "D"), sizes)
    expect_shape("weight", weight, ("D", "D"), sizes)
    expect_shape("bias", bias, ("D",), sizes)
    constants = alpha is not None and beta is not None
    learned = gate_weight is not None and gate_bias is not None
    if text is None:
        if not (alpha is beta is gate_weight is gate_bias is None):
            raise ValueError("text: expected a tensor with alpha, beta or gate_weight, got None")
        if ids is not None:
            raise ValueError("ids: expected None without a text, got a tensor")
    else:
        expect_shape("text", text, ("B" if ids is None else "n_rows", "D"), sizes)
        if ids is not None:
            _expect_ids(ids, sizes["B"], sizes["n_rows"], h)
        halves = (alpha is None) != (beta is None) or (gate_weight is None) != (gate_bias is None)
        if halves or constants == learned:
            raise ValueError("alpha: expected either alpha and beta, or gate_weight and gate_bias")
    for name, gate in (("alpha", alpha), ("beta", beta)):
        if gate is not None and gate.dim() > 0:
            expect_shape(name, gate, ("D",), sizes)
    if gate_weight is not None and gate_bias is not None:
        twice = 2 * sizes["D"]
        expect_shape("gate_weight", gate_weight, (twice, twice), sizes)
        expect_shape("gate_bias", gate_bias, (twice,), sizes)
    if (norm_weight is None) != (norm_bias is None):
        missing = "norm_weight" if norm_weight is None else "norm_bias"
        raise ValueError(f"{missing}: expected both norm_weight and norm_bias, or neither, got None")
    if norm_weight is not None and norm_bias is not None:
        expect_shape("norm_weight", norm_weight, ("D",), sizes)
        expect_shape("norm_bias", norm_bias, ("D",), sizes)
    function = resolve("gated_fusion", impl, h.device)
    return function(
        h, text, alpha, beta, weight, bias, ids=ids, gate_weight=gate_weight, gate_bias=gate_bias, residual=residual,
        norm_weight=norm_weight, norm_bias=norm_bias, eps=eps,
    )  # fmt: skip


def _expect_ids(ids: Tensor, batch: int, n_rows: int, like: Tensor) -> None:
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"ids: expected int32 or int64, got {ids.dtype}")
    expect_shape("ids", ids, (batch,), {})
    if ids.device != like.device:
        raise ValueError(f"ids: expected device {like.device}, got {ids.device}")
    if n_rows == 0 and batch > 0:
        raise ValueError("text: expected at least one row for ids, got none")
    if batch == 0 or not readable(ids):
        return
    low, high = extremes(ids)
    if low < 0 or high >= n_rows:
        raise ValueError(f"ids: expected values from 0 to {n_rows - 1}, got {low} to {high}")
