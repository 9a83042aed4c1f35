"""The adaptive Fourier filter of M2Rec: the definition by fast transforms, and the form that the kernels compute.

    X = rfft(x, dim=time)      M[k] = 1 where f_k <= theta, else 0      y = irfft(M * X)

(arXiv 2505.04445 Eqs. 10 to 13, with the cutoff theta in cycles per sample.) The filter is not causal: y[t] depends on
every x[s], later ones too.

    B batch   L slots   C channels   R basis columns   n real positions of a row
    x [B, L, C]   f frequency, cycles per sample   theta cutoff   tau width of the soft mask's edge   V basis   m gains
"""

from __future__ import annotations

import torch
from torch import Tensor

# theta * n is meant as a count of bins; without this, 0.1 * 30 / 30 would lose its last bin to rounding.
ROUNDING = 1e-9


def frequencies(n: int, basis: str = "fourier") -> Tensor:
    """Cycles per sample of each bin, float64: k / n for k = 0..n//2 (fourier), k / 2n for k = 0..n-1 (dct)."""
    k = torch.arange(n // 2 + 1 if basis == "fourier" else n, dtype=torch.float64)
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
    gain = mask_gain(frequencies(n, basis).to(x.device, x.dtype), theta, mask, tau).unsqueeze(1)
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
) -> Tensor:
    """`y = V (m * (V^T x)) [W^T + b]`, the filter as a low-rank projection.

    Args:
        x: [B, L, C].
        basis: V, [L, R] or [B, L, R].
        mask: m, [R], [B, R] or [R, C]; None is 1.
        weight: W, [C_out, C].
        bias: b, [C_out].

    Returns:
        [B, L, C] or [B, L, C_out], dtype of x; half precision is computed in float32.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    basis = basis.to(dtype)
    bins = basis.mT @ x.to(dtype)  # [B, R, C]
    if mask is not None:
        mask = mask.to(dtype)
        if mask.dim() == 1 or mask.shape == bins.shape[:2]:
            mask = mask.unsqueeze(-1)
        bins = bins * mask
    if weight is not None:  # nothing nonlinear lies in between, and there are fewer bins than positions
        bins = bins @ weight.to(dtype).t()
    y = basis @ bins
    if bias is not None:
        y = y + bias.to(dtype)
    return y.to(x.dtype)
