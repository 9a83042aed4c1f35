"""A batch of items as the encoder reads it: embedded, thinned out in training, normalised.

x = LayerNorm(dropout(table[item_ids])), and zero at padding

B batch   L slots   C channels
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def embed_norm(
    table: Tensor, item_ids: Tensor, lengths: Tensor, weight: Tensor, bias: Tensor, eps: float, dropout: float
) -> Tensor:
    """table [n_items + 1, C], item_ids [B, L], lengths [B], weight and bias [C], to [B, L, C].

    `dropout` is a probability; 0 in evaluation.
    """
    x = F.layer_norm(F.dropout(F.embedding(item_ids, table), dropout), weight.shape, weight, bias, eps)
    padding = torch.arange(item_ids.shape[1], device=item_ids.device) >= lengths.unsqueeze(1)
    return x.masked_fill(padding.unsqueeze(2), 0.0)
