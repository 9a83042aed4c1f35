"""The selective state-space recurrence, position after position (arXiv 2312.00752, Algorithm 2).

delta_t = [softplus](delta_t + delta_bias)
h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t
y_t = (C_t . h_t + D u_t) [silu(z_t)]

B batch   dim channels   N = dstate states per channel   L = seqlen
u, delta, z (B, dim, L)   A (dim, N)   B, C (B, N, L)   D, delta_bias (dim,)   h (B, dim, N)
Packed: sequence s of a single row is cu_seqlens[s] to cu_seqlens[s + 1], and starts from a state of its own.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any tensor is, else float32: the state is never kept in half precision."""
    doubles = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if doubles else torch.float32


def step_size(delta: Tensor, delta_bias: Tensor | None, delta_softplus: bool, dtype: torch.dtype) -> Tensor:
    """delta (B, dim, L) with its bias, through softplus if asked."""
    delta = delta.to(dtype)
    if delta_bias is not None:
        delta = delta + delta_bias.to(dtype)[:, None]
    return F.softplus(delta) if delta_softplus else delta


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """y (B, dim, L) in u's dtype; with `return_last_state` also the state after the last position (B, dim, N).

    With `cu_seqlens` the single row holds S sequences one after another, and there are states (S, dim, N).
    """
    if cu_seqlens is not None:
        ys, states = [], []
        for s, (start, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
            y_s, h_s = selective_scan(
                u[..., start:end],
                delta[..., start:end],
                A,
                B[..., start:end],
                C[..., start:end],
                D,
                None if z is None else z[..., start:end],
                delta_bias,
                delta_softplus,
                return_last_state=True,
                initial_state=None if initial_state is None else initial_state[s : s + 1],
            )
            ys.append(y_s)
            states.append(h_s)
        return (torch.cat(ys, dim=2), torch.cat(states)) if return_last_state else torch.cat(ys, dim=2)
    dtype = compute_dtype(u, delta, A, B, C, D, z, initial_state)
    steps = step_size(delta, delta_bias, delta_softplus, dtype)
    x, A, B, C = u.to(dtype), A.to(dtype), B.to(dtype), C.to(dtype)
    batch, dim, seqlen = u.shape
    h = x.new_zeros(batch, dim, A.shape[1]) if initial_state is None else initial_state.to(dtype)
    ys = []
    for t in range(seqlen):
        dt = steps[:, :, t, None]
        h = torch.exp(dt * A) * h + dt * B[:, None, :, t] * x[:, :, t, None]
        ys.append((h * C[:, None, :, t]).sum(dim=-1))
    y = torch.stack(ys, dim=2)
    if D is not None:
        y = y + D.to(dtype)[:, None] * x
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return (y.to(u.dtype), h) if return_last_state else y.to(u.dtype)
