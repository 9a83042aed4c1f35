"""The depthwise causal convolution in front of the scan, with the contract of `causal_conv1d.causal_conv1d_fn`.

y[b, e, t] = bias[e] + sum_j weight[e, j] x[b, e, t - (width - 1) + j],   x before the first position is 0
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """x (B, dim, seqlen), weight (dim, width), bias (dim,), activation None or "silu", to (B, dim, seqlen).

    Half precision is computed in float32 and returned as it came.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    seqlen, width = x.shape[2], weight.shape[1]
    padded = F.pad(x.to(dtype), (width - 1, 0))
    y = sum(weight[:, j, None].to(dtype) * padded[:, :, j : j + seqlen] for j in range(width))
    assert isinstance(y, Tensor)
    if bias is not None:
        y = y + bias[:, None].to(dtype)
    return (F.silu(y) if activation == "silu" else y).to(x.dtype)
