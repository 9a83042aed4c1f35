"""Embedded items as the encoder reads them: thinned out in training, normalised.

x = LayerNorm(dropout(e)), and zero at padding

B batch   L slots   C channels
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def dropout_norm(e: Tensor, lengths: Tensor, weight: Tensor, bias: Tensor, eps: float, dropout: float) -> Tensor:
    """e [B, L, C], lengths [B], weight and bias [C], to [B, L, C]. `dropout` is a probability; 0 in evaluation."""
    x = F.layer_norm(F.dropout(e, dropout), weight.shape, weight, bias, eps)
    padding = torch.arange(e.shape[1], device=e.device) >= lengths.unsqueeze(1)
    return x.masked_fill(padding.unsqueeze(2), 0.0)
