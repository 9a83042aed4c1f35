"""The spectral projection put together from launches: forward where one kernel does not hold it, and backward.

With S the spectrum that the forward saved, m the mask, w_s the tap of delay s, da = dy act'(y), G_s = V[t - s]^T da:

    filter first   dP = sum_s w_s G_s   dw_s = P . G_s    d(mS) = dP W   dW = dP^T (mS)   dx = V (m d(mS))
    filter last    dQ = m G_0           dm = Q . G_0      dT = dQ^T S    dS_s = dQ (w_s W)   dx = sum_s V[t + s] dS_s
                   with Q = sum_s S_s (w_s W)^T, P = m Q;  dW = sum_s w_s dT_s,  dw_s = W . dT_s

Filter last treats a bias as an input channel more for each tap, whose spectrum is the basis' column sums. What belongs
to one row goes through kernels that never look at another row; sums over the batch are PyTorch's.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ._common import Arithmetic
from ._spectral_fused import Operands, fits, launch_fused
from ._spectral_transforms import launch_analyse, launch_combine, launch_synthesise


def launch_forward(x: Tensor, op: Operands, *, save: bool) -> tuple[Tensor, Tensor]:
    """As `launch_fused`, for any number of columns."""
    if fits(op.basis.shape[2], op.width, op.arithmetic):
        return launch_fused(x, op, save=save)
    s = launch_analyse(x, op.basis, op.arithmetic, op.in_width)
    y = _expand(_mixed_last(s, op) if op.filter_last else _mixed(s, op), op, x.dtype)
    return y, s if save else s.new_empty(0)


def launch_backward(dy: Tensor, s: Tensor, op: Operands, *, needs_mask: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """dx, and the gradients of "mask" [B, R, filtered channels], "weight", "bias", "conv_weight" and "conv_bias"."""
    if op.conv_weight is None:
        return _backward_without_convolution(dy, s, op, needs_mask=needs_mask)
    assert op.weight is not None, "a convolution comes with a weight, if only the identity"
    backward = _backward_filter_last if op.filter_last else _backward_filter_first
    return backward(dy, s, op, op.weight, op.conv_weight, needs_mask=needs_mask)


def _backward_without_convolution(
    dy: Tensor, s: Tensor, op: Operands, *, needs_mask: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """The same operator once more: dx = V (m * (V^T da) W)."""
    da = _expand(_mixed(s, op), op, dy.dtype, dy=dy) if op.silu else dy
    turned = None if op.weight is None else op.weight.t()
    back = replace(op, weight=turned, bias=None, filter_last=turned is not None, silu=False)
    dx, g = launch_forward(da, back, save=True)
    dp = g[:, :, 0]  # [B, R, C_out]
    grads = {}
    if needs_mask:
        grads["mask"] = _through(dp, op.weight, op.arithmetic) * s[:, :, 0]
    if op.weight is not None:
        grads["weight"] = _over_rows(dp, _times(op.mask, s[:, :, 0]))
    if op.bias is not None:
        grads["bias"] = da.sum((0, 1), dtype=op.arithmetic.acc)
    return dx, grads


def _backward_filter_first(
    dy: Tensor, s: Tensor, op: Operands, weight: Tensor, conv_weight: Tensor, *, needs_mask: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    acc = op.arithmetic.acc
    p = _mixed(s, op)  # [B, R, C_out]
    da = _expand(p, op, dy.dtype, dy=dy) if op.silu else dy
    dp, dw = launch_combine(da, op.basis, p, conv_weight, op.arithmetic)
    d_masked = _through(dp, weight, op.arithmetic)
    grads = {"weight": _over_rows(dp, _times(op.mask, s[:, :, 0]))}
    if needs_mask:
        grads["mask"] = d_masked * s[:, :, 0]
    if op.bias is not None or op.conv_bias is not None:
        grads["conv_bias"] = total = da.sum((0, 1), dtype=acc)
        if op.bias is not None:
            # A tap of delay s has not seen the bias at the first s positions.
            missed = [da[:, :delay].sum((0, 1), dtype=acc) for delay in range(op.width)]
            reached = total - torch.stack(missed)
            grads["bias"] = (reached * _delays(conv_weight)).sum(0)
            dw = dw + reached * op.bias
    grads["conv_weight"] = dw.t().flip(1)
    return launch_synthesise(_times(op.mask, d_masked), op.basis, op.arithmetic, dtype=dy.dtype), grads


def _backward_filter_last(
    dy: Tensor, s: Tensor, op: Operands, weight: Tensor, conv_weight: Tensor, *, needs_mask: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    batch, columns, width, channels = s.shape
    acc = op.arithmetic.acc
    taps = _delays(conv_weight).to(acc)
    da, grads = dy, {}
    if op.silu or needs_mask:
        q = _linear_of_delays(s, op, weight, conv_weight)
    if op.silu:
        da = _expand(_times(op.mask, q), op, dy.dtype, dy=dy)
    g = launch_analyse(da, op.basis, op.arithmetic)[:, :, 0]  # [B, R, C_out]
    if needs_mask:
        grads["mask"] = g * q
    dq = _times(op.mask, g)
    by_tap = torch.einsum("so,oc->osc", taps, weight.to(acc))
    ds = _through(dq, by_tap.flatten(1), op.arithmetic).view(batch, columns, width, channels)
    dx = launch_synthesise(ds, op.basis, op.arithmetic, dtype=dy.dtype, sign=1)
    d_by_tap = _over_rows(dq, s.flatten(2)).view(-1, width, channels)  # [C_out, width, C]
    grads["weight"] = torch.einsum("osc,so->oc", d_by_tap, taps)
    dw = torch.einsum("osc,oc->so", d_by_tap, weight.to(acc))
    if op.bias is not None or op.conv_bias is not None:
        reached = _over_rows(dq, _column_sums(op.basis, width, acc)).t()  # [width, C_out]
        grads["conv_bias"] = reached[0]
        if op.bias is not None:
            grads["bias"] = (reached * taps).sum(0)
            dw = dw + reached * op.bias
    grads["conv_weight"] = dw.t().flip(1)
    return dx, grads


def _expand(p: Tensor, op: Operands, dtype: torch.dtype, dy: Tensor | None = None) -> Tensor:
    """From P to y, or with dy to dy act'(y)."""
    behind = (None, None, None) if op.filter_last else (op.bias, op.conv_weight, op.conv_bias)
    bias, conv_weight, conv_bias = behind
    return launch_synthesise(
        p, op.basis, op.arithmetic, dtype=dtype,
        bias=bias, conv_weight=conv_weight, conv_bias=conv_bias, silu=op.silu, dy=dy,
    )  # fmt: skip


def _mixed(s: Tensor, op: Operands) -> Tensor:
    """P = (m S_0) W^T: [B, R, C_out]."""
    return _through(_times(op.mask, s[:, :, 0]), None if op.weight is None else op.weight.t(), op.arithmetic)


def _mixed_last(s: Tensor, op: Operands) -> Tensor:
    """P = m sum_s S_s (w_s W)^T: [B, R, C_out]; without a convolution W alone."""
    if op.conv_weight is None or op.weight is None:
        return _times(op.mask, _mixed(s, replace(op, mask=None)))
    return _times(op.mask, _linear_of_delays(s, op, op.weight, op.conv_weight))


def _linear_of_delays(s: Tensor, op: Operands, weight: Tensor, conv_weight: Tensor) -> Tensor:
    """Q = sum_s S_s (w_s W)^T plus the biases' share, [B, R, C_out]."""
    taps = _delays(conv_weight).to(op.arithmetic.acc)
    spectrum, matrix = s.flatten(2), torch.einsum("so,oc->sco", taps, weight.to(taps.dtype)).flatten(0, 1)
    if op.bias is not None or op.conv_bias is not None:
        rows = torch.zeros_like(taps) if op.bias is None else taps * op.bias
        if op.conv_bias is not None:
            rows = torch.cat([rows[:1] + op.conv_bias, rows[1:]])
        spectrum = torch.cat([spectrum, _column_sums(op.basis, len(taps), taps.dtype)], dim=2)
        matrix = torch.cat([matrix, rows])
    return _through(spectrum, matrix, op.arithmetic)


def _through(rows: Tensor, matrix: Tensor | None, arithmetic: Arithmetic) -> Tensor:
    """rows [B, R, I] @ matrix [I, O] in a kernel that keeps batch rows apart; None is the identity."""
    return rows if matrix is None else launch_synthesise(matrix[None], rows, arithmetic, dtype=arithmetic.acc)


def _over_rows(left: Tensor, right: Tensor) -> Tensor:
    """The sum over batch and columns: [B, R, O], [B, R, I] to [O, I]."""
    return left.flatten(0, 1).t() @ right.flatten(0, 1)


def _times(mask: Tensor | None, rows: Tensor) -> Tensor:
    return rows if mask is None else rows * mask


def _delays(conv_weight: Tensor) -> Tensor:
    """w_s by delay s: [width, C_out] from [C_out, width]."""
    return conv_weight.flip(1).t()


def _column_sums(basis: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """k_s[r] = sum_t V[t + s, r]: [B, R, width]."""
    return torch.stack([basis[:, delay:].sum(1, dtype=dtype) for delay in range(width)], dim=2)
