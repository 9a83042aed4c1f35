"""What follows the scan in a layer of Mamba4Rec (arXiv 2403.03900): output projection and feed-forward.

    x = LayerNorm(dropout(y W_out^T + b_out) [+ residual])
    out = LayerNorm(x + dropout(dropout(gelu(x W_1^T + b_1)) W_2^T + b_2))

B rows   E = dim of the scan   D = d_model   H hidden width
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def output_ffn(
    y: Tensor,
    residual: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    last_weight: Tensor,
    last_bias: Tensor,
    eps: float,
    dropout: float,
) -> Tensor:
    """y [B, E], residual [B, D] or None, weights as in `torch.nn.Linear`, to [B, D].

    `norm_*` are those of the first LayerNorm, `last_*` of the second; `dropout` is a probability, 0 in evaluation.
    """
    x = F.dropout(F.linear(y, out_weight, out_bias), dropout)
    x = F.layer_norm(x if residual is None else x + residual, norm_weight.shape, norm_weight, norm_bias, eps)
    hidden = F.dropout(F.gelu(F.linear(x, fc1_weight, fc1_bias)), dropout)
    x = x + F.dropout(F.linear(hidden, fc2_weight, fc2_bias), dropout)
    return F.layer_norm(x, last_weight.shape, last_weight, last_bias, eps)
