"""The selective scan's output at the last position alone, without a recurrence.

A is constant in time, so the decay from position t to the last one depends on the sum of the steps after t:

    T_t = sum_{s > t} delta_s                                        (over real positions)
    y[e] = sum_t delta_te u_te sum_n C_n B_tn exp(A_en T_te) + D_e u_last,e     [silu(z)]

Every exponent is at most 0, and padding drops out with delta = 0. Gradients, with X = exp(A T), g = delta u and dy the
gradient of y: dC_n = sum dy g B X, dB_tn = C_n sum_e dy g X, dg = dy sum_n C B X, dA_en = dy C_n sum_t g T B X,
dT = dy g sum_n C B A X, d delta_s = sum_{t < s} dT_t + dg_s u_s, du = dg delta.

    B batch   dim channels   N = dstate   L = seqlen
    u, delta (B, dim, L)   A (dim, N)   B (B, N, L)   C (B, N) and z (B, dim) at the last position

How the exponentials are made and how the time is split are choices of an implementation that approximate this; the
specification itself computes every exponential exactly and every sum whole, whatever is asked for.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .selective_scan import compute_dtype, step_size


def last_state(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    lengths: Tensor | None = None,
    exponentials: str = "exact",
    nodes: object | None = None,
    splits: int = 1,
) -> Tensor:
    """y (B, dim) in u's dtype, at position lengths - 1 of each row (the last one where `lengths` is None).

    `exponentials`, `nodes` and `splits` change nothing here: see above.
    """
    dtype = compute_dtype(u, delta, A, B, C, D, z)
    steps = step_size(delta, delta_bias, delta_softplus, dtype)
    x, A = u.to(dtype), A.to(dtype)
    seqlen = u.shape[2]
    if lengths is not None:
        steps = steps.masked_fill((torch.arange(seqlen, device=u.device) >= lengths[:, None])[:, None], 0.0)
    decay = steps.flip(2).cumsum(2).flip(2) - steps  # T
    CB = C.to(dtype)[:, :, None] * B.to(dtype)
    # One state at a time: never a (B, dim, L, N) tensor.
    kernel = sum(CB[:, None, n] * torch.exp(A[:, n, None] * decay) for n in range(A.shape[1]))
    assert isinstance(kernel, Tensor)
    y = (steps * x * kernel).sum(dim=2)
    if D is not None:
        if lengths is None:
            last = x[:, :, -1]
        else:
            last = x.gather(2, (lengths - 1)[:, None, None].expand(-1, x.shape[1], 1)).squeeze(2)
        y = y + D.to(dtype) * last
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(u.dtype)
