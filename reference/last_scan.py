"""What follows the filtered convolution in a Mamba-1 block, up to the output projection, at the last position alone.

    u = silu(p)        delta, B, C = x_proj(u)        dt = softplus(dt_proj(delta))
    y = scan(u, dt, A, B, C, D) at the last position, in closed form (`last_state.py`), then y * silu(z)

Positions are every stride-th one, counted back from the last real one.

    B batch   L = seqlen   E = dim   N = dstate
    p [B, L, E]   A [E, N]   D [E]   z and y [B, E] at the last position
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .last_state import last_state
from .selective_scan import compute_dtype


def slowest_first(A: Tensor, dt_proj_bias: Tensor | None) -> Tensor:
    """The channels in the order of their decay [E]: A [E, N] and dt_proj_bias [E], or None, as of `last_scan`."""
    rates = A.detach().amax(1)  # negative
    return (rates if dt_proj_bias is None else rates * F.softplus(dt_proj_bias.detach())).argsort(descending=True)


def last_scan(
    p: Tensor,
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    dt_proj_bias: Tensor | None,
    A: Tensor,
    D: Tensor,
    z: Tensor | None,
    lengths: Tensor,
    stride: int = 1,
    order: Tensor | None = None,
    *,
    scan: Callable[..., Tensor] = last_state,
) -> Tensor:
    """y [B, E] in p's dtype, at position lengths - 1 of each row; `scan` computes `last_state`.

    Channel e of p is channel order[e] of all else; None for the same.
    """
    if order is not None:
        p = p[:, :, order.argsort()]
    dtype = compute_dtype(p, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D, z)
    # The last position comes first: then padding stands at the end for every stride.
    steps = (lengths + stride - 1).div(stride, rounding_mode="floor")
    slots = -(-p.shape[1] // stride)
    order = steps[:, None] - 1 - torch.arange(slots, device=p.device)  # 0 for a row's last, negative in its padding
    positions = (lengths[:, None] - 1 - stride * order).clamp(max=p.shape[1] - 1)
    u = F.silu(p.to(dtype).gather(1, positions[:, :, None].expand(-1, -1, p.shape[2])))
    dt_rank, dstate = dt_proj_weight.shape[1], A.shape[1]
    delta, B, C = F.linear(u, x_proj_weight.to(dtype)).split([dt_rank, dstate, dstate], dim=2)
    y = scan(
        u.mT,
        F.linear(delta, dt_proj_weight.to(dtype)).mT,
        A,
        B.mT,
        C.gather(1, (steps - 1)[:, None, None].expand(-1, 1, dstate)).squeeze(1),
        D,
        z,
        dt_proj_bias,
        delta_softplus=True,
        lengths=steps,
    )
    return y.to(p.dtype)
