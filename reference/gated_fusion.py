"""The learned mix of what the user did and what the last item's text says (arXiv 2505.04445 Eq. 16).

Y = [LayerNorm] (W (alpha * E_l + beta * E_m) + b  [+ E_m])

E_m = h [B, D], the sequence encoder's output   E_l = text [B, D], the projected text embedding of the last item, or
row ids[b] of the projected table [n_rows, D]   alpha, beta: two numbers (the paper), two vectors, or sigmoids of both
inputs
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
    """h, text [B, D]; alpha, beta [] or [D]; weight [D, D]; bias, norm_weight, norm_bias [D]; to [B, D], dtype of h.

    With ids [B], text is a table [n_rows, D] and row ids[b] belongs to h[b].
    With gate_weight [2 D, 2 D] and gate_bias [2 D], alpha and beta are the halves of sigmoid(Linear(cat(text, h))).
    Without text: Y = W h + b [+ h], the control that has the same Linear and skip but reads no text.
    Half precision is computed in float32.
    """
    dtype = torch.promote_types(h.dtype, torch.float32)
    x = mixed = h.to(dtype)
    if text is not None:
        rows = (text if ids is None else text[ids]).to(dtype)
        if gate_weight is not None and gate_bias is not None:
            gates = torch.sigmoid(F.linear(torch.cat([rows, x], dim=-1), gate_weight.to(dtype), gate_bias.to(dtype)))
            alpha, beta = gates.chunk(2, dim=-1)
        assert alpha is not None
        assert beta is not None
        mixed = alpha.to(dtype) * rows + beta.to(dtype) * x
    y = F.linear(mixed, weight.to(dtype), bias.to(dtype))
    if residual:
        y = y + x
    if norm_weight is not None and norm_bias is not None:
        y = F.layer_norm(y, y.shape[-1:], norm_weight.to(dtype), norm_bias.to(dtype), eps)
    return y.to(h.dtype)


def scale_text(table: Tensor, kind: str = "unit_variance") -> Tensor:
    """A text table [n_items + 1, T] as the gate reads it.

    "unit_variance": every feature with mean 0 and variance 1 over the rows that have text (a feature that does not vary
    becomes 0); rows without text, all zero, stay zero, which is then the average item. "none": as it is.
    """
    if kind == "none":
        return table.clone()
    has_text = table.any(dim=1)
    if not has_text.any():
        return table.clone()
    rows = table[has_text].double()
    spread = rows.std(dim=0, correction=0)
    flat = spread <= 1e-12 * rows.abs().amax(dim=0).clamp(min=1e-300)
    scaled = torch.where(flat, 0.0, (rows - rows.mean(dim=0)) / torch.where(flat, 1.0, spread))
    result = torch.zeros_like(table)
    result[has_text] = scaled.to(table.dtype)
    return result
