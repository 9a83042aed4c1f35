"""Spectral bases as plain matrices: the low-pass filter as a low-rank projection.

A filter that keeps a few frequencies of a real sequence of length n is `x_f = V (m * (V^T x))`, where the columns of V
[n, R] are orthonormal cosines and sines (or DCT-II cosines) and m is the gain of each column. The forward transform
is one small matrix product, and its transpose is the gradient. A row that is shorter than its batch has its own basis,
zero beyond its length, so one formula serves the padded and the valid spectrum.

Column c of the Fourier basis: c = 0 is the mean, then cosine and sine of k = 1, 2, ... in turn; the Nyquist frequency
of an even length has a cosine only. Column c of the DCT basis is cos(pi c (t + 1/2) / n).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .config import Basis, Mask

# theta * n is meant as a count of bins: 0.1 * 30 is 3.0000000000000004 and 0.7 * 10 is 6.999999999999999.
_ROUNDING = 1e-9


def n_columns(seqlen: int, theta: float | None, kind: Basis) -> int:
    """R, how many basis columns lie at or below `theta` cycles per sample; all `seqlen` of them for None."""
    if theta is None or theta >= 0.5:
        return seqlen
    if kind == "fourier":
        return min(2 * math.floor(theta * seqlen + _ROUNDING) + 1, seqlen)
    return min(math.floor(2 * theta * seqlen + _ROUNDING) + 1, seqlen)


def column_frequencies(lengths: Tensor, columns: int, kind: Basis, dtype: torch.dtype = torch.float32) -> Tensor:
    """Cycles per sample of each basis column, [B, columns], for rows of `lengths` [B]."""
    column = torch.arange(columns, device=lengths.device)
    n = lengths.to(dtype).unsqueeze(1)
    return (column + 1).div(2, rounding_mode="floor") / n if kind == "fourier" else column / (2 * n)


def row_basis(lengths: Tensor, seqlen: int, columns: int, kind: Basis, dtype: torch.dtype = torch.float32) -> Tensor:
    """The first `columns` basis vectors of each row over its own length: [B, seqlen, columns].

    Args:
        lengths: [B] int64, at least 1.
        seqlen: L; positions at or beyond a row's length are zero.
        columns: R; columns beyond a row's number of frequencies are zero.
        kind: "fourier" or "dct".
        dtype: float32 or float64.

    The phase is reduced modulo a full turn in integers, so a large k * t costs no accuracy.
    """
    device = lengths.device
    n = lengths.view(-1, 1, 1)
    t = torch.arange(seqlen, device=device).view(1, -1, 1)
    c = torch.arange(columns, device=device).view(1, 1, -1)
    if kind == "fourier":
        k = (c + 1).div(2, rounding_mode="floor")
        is_sine = (c % 2 == 0) & (c > 0)
        angle = (2 * math.pi) * ((k * t) % n).to(dtype) / n
        value = torch.where(is_sine, torch.sin(angle), torch.cos(angle))
        single = (k == 0) | (2 * k == n)
        real = (t < n) & (2 * k <= n) & ~(is_sine & single)
    else:
        value = torch.cos((2 * math.pi) * ((c * (2 * t + 1)) % (4 * n)).to(dtype) / (4 * n))
        single = c == 0
        real = (t < n) & (c < n)
    norm = torch.where(single, 1.0, 2.0).to(dtype).div(n).sqrt()
    return torch.where(real, value * norm, 0.0)


def mask_gain(frequencies: Tensor, theta: Tensor | float, kind: Mask, tau: float) -> Tensor:
    """The gain m of each frequency, same shape as `frequencies` (cycles per sample).

    "hard": 1 where f <= theta, else 0 (arXiv 2505.04445 Eq. 12). "soft": sigmoid((theta - f) / tau).
    "straight_through": the hard gain with the soft gain's gradient.
    """
    hard = (frequencies <= theta + _ROUNDING).to(frequencies.dtype)
    if kind == "hard":
        return hard
    soft = torch.sigmoid((theta - frequencies) / tau)
    return soft if kind == "soft" else hard + soft - soft.detach()
