"""Item ids in, query vectors out: the last position of a one-layer M2Rec on folded weights (`fastm2rec/folded.py`).

p[t]  = u_table[id_t], 0 at padding
inner:  pre = V (m * V^T conv(p))        input:  pre = conv(V (m * V^T p))        none:  pre = conv(p)
u     = silu(pre) at t = n - 1, n - 1 - stride, ...
delta = softplus(u step_down step_up + step_bias);  B = u B_weight;  C = u_last C_weight
y     = the scan's output at n - 1, in closed form (`last_scan.py`);  y = LayerNorm(y) where there is a scan_norm
h     = LayerNorm(y silu(z) out_proj);  h = LayerNorm(h + gelu(h fc1 + ..) fc2 + ..)
constant:  Y = h mix + mix_bias + text_table[id_last] [+ h]
context:   Y = (a text_table[id_last] + b h) mix + mix_bias [+ h],  a, b = sigmoid(gate_table[id_last] + h gate_weight)

B batch   L slots   n a row's length   D = d_model   E = d_inner   N = d_state
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .causal_conv1d import causal_conv1d
from .last_scan import last_scan


def encode_last(item_ids: Tensor, lengths: Tensor, folded: Any, *, scan: Callable[..., Tensor] = last_scan) -> Tensor:
    """item_ids [B, L], lengths [B] and a `Folded` to [B, D] in its dtype; half precision is computed in float32.

    `scan` computes `last_scan`.
    """
    dtype = torch.promote_types(folded.u_table.dtype, torch.float32)
    item_ids = F.pad(item_ids, (0, folded.max_len - item_ids.shape[1]))
    slots = torch.arange(item_ids.shape[1], device=item_ids.device)
    item_ids = item_ids.masked_fill(slots >= lengths[:, None], 0)
    last_id = item_ids.gather(1, lengths[:, None] - 1).squeeze(1)

    p = _before_silu(folded.u_table[item_ids].to(dtype), lengths, folded, dtype)
    z = folded.z_table[last_id].to(dtype)
    if folded.placement == "input":
        weights = folded.last_weights[lengths - 1].to(dtype)
        z = (weights[:, None] @ folded.z_table[item_ids].to(dtype)).squeeze(1)

    projections = torch.cat([folded.step_down, folded.B_weight, folded.C_weight], dim=1)
    y = scan(
        p,
        projections.to(dtype).mT,
        folded.step_up.to(dtype).mT,
        folded.step_bias.to(dtype),
        folded.A.to(dtype).mT,
        folded.D.to(dtype),
        None,
        lengths,
        folded.stride,
    )
    if folded.scan_norm_weight is not None:
        y = F.layer_norm(y, y.shape[1:], folded.scan_norm_weight, folded.scan_norm_bias, folded.eps)
    h = (y * F.silu(z)) @ folded.out_proj.to(dtype)
    h = F.layer_norm(h, h.shape[1:], folded.norm_weight, folded.norm_bias, folded.eps)
    hidden = F.gelu(h @ folded.fc1.to(dtype) + folded.fc1_bias)
    h = h + hidden @ folded.fc2.to(dtype) + folded.fc2_bias
    h = F.layer_norm(h, h.shape[1:], folded.ffn_norm_weight, folded.ffn_norm_bias, folded.eps)
    return _output(h, last_id, folded, dtype).to(folded.u_table.dtype)


def _before_silu(p: Tensor, lengths: Tensor, folded: Any, dtype: torch.dtype) -> Tensor:
    """p [B, L, E] through filter and convolution."""
    weight = folded.taps.t().flip(1)
    if folded.placement == "input":
        p = _filtered(p, lengths, folded, dtype)
    pre = causal_conv1d(p.mT, weight, folded.conv_bias).mT
    return _filtered(pre, lengths, folded, dtype) if folded.placement == "inner" else pre


def _filtered(x: Tensor, lengths: Tensor, folded: Any, dtype: torch.dtype) -> Tensor:
    spectrum = slice(None) if len(folded.basis) == 1 else lengths - 1
    basis = folded.basis[spectrum].to(dtype)
    return basis @ (folded.gain[spectrum].to(dtype)[:, :, None] * (basis.mT @ x))


def _output(h: Tensor, last_id: Tensor, folded: Any, dtype: torch.dtype) -> Tensor:
    if folded.gate == "none":
        return h
    mixed = h
    if folded.gate == "context":
        text = folded.text_table[last_id].to(dtype)
        gates = torch.sigmoid(folded.gate_table[last_id].to(dtype) + h @ folded.gate_weight.to(dtype))
        alpha, beta = gates.chunk(2, dim=1)
        mixed = alpha * text + beta * h
    y = mixed @ folded.mix.to(dtype) + folded.mix_bias
    if folded.gate == "constant":
        y = y + folded.text_table[last_id].to(dtype)
    return y + h if folded.residual else y
