"""The softmax cross-entropy of queries against the whole catalogue.

loss = sum or mean over rows of log(sum over items of exp(s)) - s[target]        s = q W^T

The scores of a batch are a [rows, items] matrix, by far the largest tensor of a training step. torch 2.13's
`linear_cross_entropy` makes it in pieces of some rows at a time and never holds it whole.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows of scores made at once. On a CPU 128 rows stay in its caches: 1.7 to 2.9 times as fast as the whole matrix at
# 512 to 2048 rows, 1.3 to 100 thousand items and D = 64, one thread; the rule of torch itself takes as few as one row
# there, and is slower than no chunks. A GPU wants long matrix products, so there only memory is bounded, to 128 MB.
CPU_ROWS = 128
MAX_SCORES = 2**25


def cross_entropy(query: Tensor, weight: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """query [B, D], weight [n_items + 1, D] whose row 0 is no item, targets [B] from 1, to a number."""
    weight, targets = weight[1:], targets - 1
    rows = CPU_ROWS if query.device.type == "cpu" else max(CPU_ROWS, MAX_SCORES // len(weight))
    if len(query) <= rows or not hasattr(F, "linear_cross_entropy"):  # torch 2.11 and 2.12 have no such function
        return F.cross_entropy(query @ weight.t(), targets, reduction=reduction)
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows, chunking_method=None)
    return F.linear_cross_entropy(query, weight, targets, reduction=reduction, options=options)
