"""The spectral projection put together from launches: forward where one kernel does not hold it, and backward.

With S the spectrum that the forward saved, m the mask, w_s the tap of delay s, da = dy act'(y), G_s = V[t - s]^T da:

    filter first   dP = sum_s w_s G_s   dw_s = P . G_s    d(mS) = dP W   dW = dP^T (mS)   dx = V (m d(mS))
    filter last    dQ = m G_0           dm = Q . G_0      dT = dQ^T S    dS_s = dQ (w_s W)   dx = sum_s V[t + s] dS_s
                   with Q = sum_s S_s (w_s W)^T, P = m Q;  dW = sum_s w_s dT_s,  dw_s = W . dT_s

Filter last treats a bias as an input channel more for each tap, whose spectrum is the basis' column sums. What belongs to
one row goes through kernels that never look at another row; sums over the batch are PyTorch's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._spectral_fused import fits, launch_fused
from ._spectral_transforms import Arithmetic, launch_analyse, launch_synthesise


def launch_forward(
    x: Tensor,
    basis: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    arithmetic: Arithmetic,
    *,
    filter_last: bool,
    silu: bool,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """As `launch_fused`, for any number of columns."""
    width = 0 if conv_weight is None else conv_weight.shape[1]
    if fits(basis.shape[2], width, arithmetic):
        return launch_fused(
            x, basis, mask, weight, bias, conv_weight, conv_bias, arithmetic,
            filter_last=filter_last, silu=silu, save=save,
        )  # fmt: skip
    behind = (bias, conv_weight, conv_bias)
    if filter_last:
        s, _ = launch_analyse(x, basis, arithmetic, width=width or 1)
        p = _times(mask, _mix_last(s, basis, weight, *behind, arithmetic))
        behind = (None, None, None)
    else:
        s, _ = launch_analyse(x, basis, arithmetic)
        p = _through(_times(mask, s[:, :, 0]), None if weight is None else weight.t(), arithmetic)
    bias, conv_weight, conv_bias = behind
    y = launch_synthesise(
        p, basis, arithmetic, dtype=x.dtype, bias=bias, conv_weight=conv_weight, conv_bias=conv_bias, silu=silu
    )
    return y, s if save else s.new_empty(0)


def launch_backward(
    dy: Tensor,
    s: Tensor,
    basis: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    arithmetic: Arithmetic,
    *,
    filter_last: bool,
    silu: bool,
    needs_mask: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """dx, and the gradients of "mask" [B, R, filtered channels], "weight", "bias", "conv_weight" and "conv_bias"."""
    if filter_last:
        return _backward_last(
            dy, s, basis, mask, weight, bias, conv_weight, conv_bias, arithmetic, silu=silu, needs_mask=needs_mask
        )
    masked = _times(mask, s[:, :, 0])  # [B, R, C]
    da, p = dy, None
    if silu or conv_weight is not None:
        p = _through(masked, None if weight is None else weight.t(), arithmetic)  # [B, R, C_out]
    if silu:
        da = launch_synthesise(
            p, basis, arithmetic, dtype=dy.dtype, bias=bias, conv_weight=conv_weight, conv_bias=conv_bias, dy=dy
        )
    grads: dict[str, Tensor] = {}
    if conv_weight is None:
        back = None if weight is None else weight.t()
        dx, g = launch_forward(
            da, basis, mask, back, None, None, None, arithmetic, filter_last=back is not None, silu=False, save=True
        )
        dp = g[:, :, 0]
        if needs_mask:
            grads["mask"] = _through(dp, weight, arithmetic) * s[:, :, 0]
    else:
        width = conv_weight.shape[1]
        dp, dw = launch_analyse(da, basis, arithmetic, width=width, sign=-1, combine=(p, conv_weight))
        d_masked = _through(dp, weight, arithmetic)
        if needs_mask:
            grads["mask"] = d_masked * s[:, :, 0]
        dx = launch_synthesise(_times(mask, d_masked), basis, arithmetic, dtype=dy.dtype)
        grads["conv_weight"] = dw
    if weight is not None:
        grads["weight"] = _over_rows(dp, masked)
    if bias is not None or conv_bias is not None:
        total = da.sum((0, 1), dtype=arithmetic.acc)
        grads["bias"] = grads["conv_bias"] = total
        if bias is not None and conv_weight is not None:
            # A tap of delay s has not seen the bias at the first s positions.
            reached = torch.stack([total - da[:, :delay].sum((0, 1), dtype=arithmetic.acc) for delay in range(width)])
            grads["bias"] = (reached * _delays(conv_weight)).sum(0)
            grads["conv_weight"] = dw + reached * bias
    if conv_weight is not None:
        grads["conv_weight"] = grads["conv_weight"].t().flip(1)
    return dx, grads


def _backward_last(
    dy: Tensor,
    s: Tensor,
    basis: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    arithmetic: Arithmetic,
    *,
    silu: bool,
    needs_mask: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    batch, columns, width, channels = s.shape
    taps = _delays(conv_weight).to(arithmetic.acc)
    da, grads = dy, {}
    if silu or needs_mask:
        q = _mix_last(s, basis, weight, bias, conv_weight, conv_bias, arithmetic)
    if silu:
        da = launch_synthesise(_times(mask, q), basis, arithmetic, dtype=dy.dtype, dy=dy)
    g = launch_analyse(da, basis, arithmetic)[0][:, :, 0]  # [B, R, C_out]
    if needs_mask:
        grads["mask"] = g * q
    dq = _times(mask, g)
    by_tap = torch.einsum("so,oc->osc", taps, weight.to(taps.dtype))
    ds = _through(dq, by_tap.flatten(1), arithmetic).view(batch, columns, width, channels)
    dx = launch_synthesise(ds, basis, arithmetic, dtype=dy.dtype, sign=1)
    d_by_tap = _over_rows(dq, s.flatten(2)).view(-1, width, channels)  # [C_out, width, C]
    grads["weight"] = torch.einsum("osc,so->oc", d_by_tap, taps)
    dw = torch.einsum("osc,oc->so", d_by_tap, weight.to(taps.dtype))
    if bias is not None or conv_bias is not None:
        reached = _over_rows(dq, _column_sums(basis, width, arithmetic.acc)).t()  # [width, C_out]
        grads["conv_bias"] = reached[0]
        if bias is not None:
            grads["bias"] = (reached * taps).sum(0)
            dw = dw + reached * bias
    grads["conv_weight"] = dw.t().flip(1)
    return dx, grads


def _mix_last(
    s: Tensor,
    basis: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    arithmetic: Arithmetic,
) -> Tensor:
    """Q = sum_s S_s (w_s W)^T plus the biases' share, [B, R, C_out]."""
    if weight is None or conv_weight is None:
        return _through(s[:, :, 0], None if weight is None else weight.t(), arithmetic)
    taps = _delays(conv_weight).to(arithmetic.acc)
    spectrum, matrix = s.flatten(2), torch.einsum("so,oc->sco", taps, weight.to(taps.dtype)).flatten(0, 1)
    if bias is not None or conv_bias is not None:
        rows = torch.zeros_like(taps) if bias is None else taps * bias
        if conv_bias is not None:
            rows = torch.cat([rows[:1] + conv_bias, rows[1:]])
        spectrum = torch.cat([spectrum, _column_sums(basis, len(taps), arithmetic.acc)], dim=2)
        matrix = torch.cat([matrix, rows])
    return _through(spectrum, matrix, arithmetic)


def _through(rows: Tensor, matrix: Tensor | None, arithmetic: Arithmetic) -> Tensor:
    """rows [B, R, I] @ matrix [I, O] in a kernel that keeps batch rows apart; None is the identity."""
    return rows if matrix is None else launch_synthesise(matrix[None], rows, arithmetic, dtype=arithmetic.acc)


def _over_rows(left: Tensor, right: Tensor) -> Tensor:
    """sum over batch and columns: [B, R, O], [B, R, I] to [O, I]."""
    return left.flatten(0, 1).t() @ right.flatten(0, 1)


def _times(mask: Tensor | None, rows: Tensor) -> Tensor:
    return rows if mask is None else rows * mask


def _delays(conv_weight: Tensor) -> Tensor:
    """w_s: [width, C_out], by delay."""
    return conv_weight.flip(1).t()


def _column_sums(basis: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """k_s[r] = sum_t V[t + s, r]: [B, R, width]."""
    return torch.stack([basis[:, delay:].sum(1, dtype=dtype) for delay in range(width)], dim=2)
