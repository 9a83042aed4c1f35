"""The low-pass filter as a module: it owns theta and the basis, `ops.spectral_projection` does the work."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from . import ops
from .basis import column_frequencies, mask_gain, n_columns, row_basis
from .config import M2RecConfig


class SpectralFilter(nn.Module):
    """Keeps the slow part of a sequence: `y = V (m * (V^T x))` (arXiv 2505.04445 Eqs. 10 to 13).

    Not causal: every output position depends on every input position, later ones too.

    Args:
        config: theta, mask, tau, basis and spectrum. With a "soft" or "straight_through" mask theta is learned, kept
            inside (0, 0.5) by `theta = 0.5 * sigmoid(theta_logit)`; a "hard" mask has no parameter.
    """

    def __init__(self, config: M2RecConfig) -> None:
        super().__init__()
        self.kind = config.basis
        self.mask = config.mask
        self.tau = config.tau
        self.spectrum = config.spectrum
        self._theta = config.theta
        if config.mask != "hard":
            share = 2 * config.theta
            self.theta_logit = nn.Parameter(torch.tensor(math.log(share / (1 - share))))

    @property
    def theta(self) -> Tensor | float:
        """The cutoff in cycles per sample: a number, or a 0-dim tensor where it is learned."""
        return self._theta if self.mask == "hard" else 0.5 * torch.sigmoid(self.theta_logit)

    def forward(self, x: Tensor, lengths: Tensor, impl: str = "auto") -> Tensor:
        """Filter x [B, L, C] along L; `lengths` [B] int64 matter to the valid spectrum only. Returns [B, L, C]."""
        if self.mask == "hard" and self._theta >= 0.5:
            return x
        seqlen = x.shape[1]
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        columns = n_columns(seqlen, self._theta if self.mask == "hard" else None, self.kind)
        if self.spectrum == "padded":  # one basis for all rows
            lengths = torch.full((1,), seqlen, dtype=torch.int64, device=x.device)
        basis = row_basis(lengths, seqlen, columns, self.kind, dtype)
        gain = mask_gain(column_frequencies(lengths, columns, self.kind, dtype), self.theta, self.mask, self.tau)
        if self.spectrum == "padded":
            basis, gain = basis[0], gain[0]
        return ops.spectral_projection(x, basis, gain, impl=impl)
