"""The adaptive Fourier filter of M2Rec: the definition by fast transforms, and the form that the kernels compute.

    X = rfft(x, dim=time)      M[k] = 1 where f_k <= theta, else 0      y = irfft(M * X)

(arXiv 2505.04445 Eqs. 10 to 13, with the cutoff theta in cycles per sample.) The filter is not causal: y[t] depends on
every x[s], later ones too.

    B batch   L slots   C channels   R basis columns   n real positions of a row
    x [B, L, C]   f frequency, cycles per sample   theta cutoff   tau width of the soft mask's edge   V basis   m gains
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .causal_conv1d import causal_conv1d

# theta * n is meant as a count of bins; without this, 0.1 * 30 / 30 would lose its last bin to rounding.
ROUNDING = 1e-9


def frequencies(n: int, basis: str = "fourier", device: torch.device | None = None) -> Tensor:
    """Cycles per sample of each bin, float64: k / n for k = 0..n//2 (fourier), k / 2n for k = 0..n-1 (dct)."""
    k = torch.arange(n // 2 + 1 if basis == "fourier" else n, dtype=torch.float64, device=device)
    return k / n if basis == "fourier" else k / (2 * n)


def mask_gain(freqs: Tensor, theta: float | Tensor, kind: str = "hard", tau: float = 0.02) -> Tensor:
    """The gain of each frequency, by Eq. 12 ("hard"), sigmoid((theta - f) / tau) ("soft"), or both ("straight_through":
    the hard gain with the soft gain's gradient). A hard mask with theta >= 0.5 keeps everything."""
    hard = (freqs <= theta + ROUNDING).to(freqs.dtype)
    if kind == "hard":
        return hard
    soft = torch.sigmoid((theta - freqs) / tau)
    return soft if kind == "soft" else soft + (hard - soft).detach()


def spectral_filter(
    x: Tensor,
    theta: float | Tensor,
    *,
    mask: str = "hard",
    tau: float = 0.02,
    basis: str = "fourier",
    spectrum: str = "padded",
    lengths: Tensor | None = None,
) -> Tensor:
    """Filter x [B, L, C] along L.

    Args:
        x: half precision is computed in float32.
        theta: cutoff in cycles per sample, a number or a 0-dim tensor that may need a gradient.
        mask: "hard", "soft" or "straight_through".
        tau: width of the soft mask's edge, cycles per sample.
        basis: "fourier", or "dct" (an even extension, so the ends do not wrap around to each other).
        spectrum: "padded" transforms all L slots; "valid" each row's first lengths[b] slots, and returns zeros behind.
        lengths: [B] int64, 1 to L; needed for "valid".
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if spectrum == "padded":
        return _filter(wide, theta, mask, tau, basis).to(x.dtype)
    if lengths is None:
        raise ValueError("lengths: expected the rows' lengths with spectrum='valid', got None")
    rows = []
    for row, n in zip(wide, lengths.tolist(), strict=True):
        filtered = _filter(row[None, :n], theta, mask, tau, basis)[0]
        rows.append(torch.cat([filtered, torch.zeros_like(row[n:])]))
    return torch.stack(rows).to(x.dtype)


def _filter(x: Tensor, theta: float | Tensor, mask: str, tau: float, basis: str) -> Tensor:
    n = x.shape[1]
    gain = mask_gain(frequencies(n, basis, x.device).to(x.dtype), theta, mask, tau).unsqueeze(1)
    if basis == "fourier":
        return torch.fft.irfft(torch.fft.rfft(x, dim=1) * gain, n=n, dim=1)
    # The DCT-II of x is the DFT of x followed by its mirror image (times a phase that a real gain commutes with).
    mirrored = torch.cat([x, x.flip(1)], dim=1)
    gain = torch.cat([gain, torch.zeros_like(gain[:1])])  # an even extension has nothing at its Nyquist frequency
    return torch.fft.irfft(torch.fft.rfft(mirrored, dim=1) * gain, n=2 * n, dim=1)[:, :n]


def spectral_projection(
    x: Tensor,
    basis: Tensor,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    conv_weight: Tensor | None = None,
    conv_bias: Tensor | None = None,
    conv_first: bool = False,
    activation: str | None = None,
) -> Tensor:
    """The filter as a low-rank projection, `V (m * (V^T x))`, with the Linear and the causal convolution beside it.

    `act(conv(filter(x) W^T + b))`, or with `conv_first` `act(filter(conv(x W^T + b)))`; every part but the filter may
    be left out.

    Args:
        x: [B, L, C].
        basis: V, [L, R] or [B, L, R].
        mask: m, [R], [B, R] or [R, channels of what is filtered]; None is 1.
        weight: W, [C_out, C].
        bias: b, [C_out].
        conv_weight: [C_out, width].
        conv_bias: [C_out].
        conv_first: the filter comes after the convolution.
        activation: None or "silu".

    Returns:
        [B, L, C] or [B, L, C_out], dtype of x; half precision is computed in float32.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = x.to(dtype)
    if not conv_first:
        y = _projected(y, basis.to(dtype), mask)
    if weight is not None:
        y = F.linear(y, weight.to(dtype), None if bias is None else bias.to(dtype))
    if conv_weight is not None:
        y = causal_conv1d(y.mT, conv_weight, conv_bias).mT
    if conv_first:
        y = _projected(y, basis.to(dtype), mask)
    return (F.silu(y) if activation == "silu" else y).to(x.dtype)


def _projected(x: Tensor, basis: Tensor, mask: Tensor | None) -> Tensor:
    bins = basis.mT @ x  # [B, R, C]
    if mask is not None:
        per_column = mask.dim() == 1 or mask.shape == bins.shape[:2]
        bins = bins * (mask.unsqueeze(-1) if per_column else mask).to(x.dtype)
    return basis @ bins


def spectral_projection_fft(
    x: Tensor, gain: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """The same filter for long sequences, by fast transforms: `irfft(g * rfft(x)) [W^T + b]`.

    Args:
        x: [B, L, C].
        gain: g of the first K of the L // 2 + 1 bins, the others are dropped: [K] or [K, C].
        weight: W, [C_out, C].
        bias: b, [C_out].

    Returns:
        [B, L, C] or [B, L, C_out], dtype of x; half precision is computed in float32.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    bins = torch.fft.rfft(x.to(dtype), dim=1)
    bins = bins[:, : gain.shape[0]] * (gain.unsqueeze(-1) if gain.dim() == 1 else gain).to(dtype)
    y = torch.fft.irfft(bins, n=x.shape[1], dim=1)  # takes the bins that are missing for zeros
    if weight is not None:
        y = F.linear(y, weight.to(dtype), None if bias is None else bias.to(dtype))
    return y.to(x.dtype)
