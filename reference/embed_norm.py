"""Embedded items as the encoder reads them: thinned out in training, normalised.

x = LayerNorm(dropout(table[ids])), and zero at padding

B batch   L slots   C channels   V rows of the table
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .positions import with_one


def embed_norm(
    item_ids: Tensor, lengths: Tensor, table: Tensor, weight: Tensor, bias: Tensor, eps: float, dropout: float
) -> tuple[Tensor, Tensor]:
    """item_ids [B, L], lengths [B], table [V, C], weight and bias [C], to x [B, L, C] and each row's last of it [B, C].

    `dropout` is a probability; 0 in evaluation.
    """
    x = F.layer_norm(F.dropout(F.embedding(item_ids, table), dropout), weight.shape, weight, bias, eps)
    padding = torch.arange(item_ids.shape[1], device=table.device) >= lengths.unsqueeze(1)
    return with_one(x.masked_fill(padding.unsqueeze(2), 0.0), lengths - 1)
