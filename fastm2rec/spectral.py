"""The low-pass filter as a module: it owns theta and the basis, `ops.spectral_projection` does the work."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .basis import column_frequencies, mask_gain, n_columns, row_basis
from .config import M2RecConfig
from .reference.positions import take


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
        self._kept: dict[tuple[int, torch.dtype, torch.device], tuple[Tensor, Tensor, Tensor]] = {}
        if config.mask != "hard":
            share = 2 * config.theta
            self.theta_logit = nn.Parameter(torch.tensor(math.log(share / (1 - share))))

    @property
    def theta(self) -> Tensor | float:
        """The cutoff in cycles per sample: a number, or a 0-dim tensor where it is learned."""
        return self._theta if self.mask == "hard" else 0.5 * torch.sigmoid(self.theta_logit)

    @property
    def is_identity(self) -> bool:
        """Does it keep every frequency?"""
        return self.mask == "hard" and self._theta >= 0.5

    def forward(self, x: Tensor, lengths: Tensor, impl: str = "auto") -> Tensor:
        """Filter x [B, L, C] along L; `lengths` [B] int64 matter to the valid spectrum only. Returns [B, L, C]."""
        if self.is_identity:
            return x
        if self._by_transform(x.shape[1]):
            return ops.spectral_projection_fft(x, self._bin_gain(x), impl=impl)
        return ops.spectral_projection(x, *self.columns(x, lengths), impl=impl)

    def project(
        self,
        x: Tensor,
        lengths: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        conv_weight: Tensor,
        conv_bias: Tensor | None,
        conv_first: bool,
        activation: Literal["silu"] | None,
        impl: str = "auto",
    ) -> Tensor:
        """`act(conv(filter(x) W^T + b))`, or with `conv_first` `act(filter(conv(x W^T + b)))`: one op, not four.

        x [B, L, C], lengths [B], weight [E, C], bias [E], conv_weight [E, width], conv_bias [E], to [B, L, E].
        """
        if self.is_identity or self._by_transform(x.shape[1]):
            u = F.linear(x if conv_first else self(x, lengths, impl), weight, bias).transpose(1, 2)
            if self.is_identity or not conv_first:
                return ops.causal_conv1d(u, conv_weight, conv_bias, activation, impl=impl).transpose(1, 2)
            convolved = self(ops.causal_conv1d(u, conv_weight, conv_bias, impl=impl).transpose(1, 2), lengths, impl)
            return F.silu(convolved) if activation == "silu" else convolved
        basis, gain = self.columns(x, lengths)
        return ops.spectral_projection(
            x, basis, gain, weight, bias,
            conv_weight=conv_weight, conv_bias=conv_bias, conv_first=conv_first, activation=activation, impl=impl,
        )  # fmt: skip

    def last(self, x: Tensor, lengths: Tensor) -> Tensor:
        """`forward` at the last real position alone: x [B, L, C] and lengths [B] to [B, C]."""
        if self.is_identity:
            return take(x, lengths - 1)
        basis, gain = self.columns(x, lengths)
        basis = basis.expand(len(x), -1, -1)
        row = (take(basis, lengths - 1) * gain).unsqueeze(1)  # [B, 1, R]
        return (row @ basis.mT @ x.to(basis.dtype)).squeeze(1).to(x.dtype)

    def columns(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """The basis, [L, R] or one of each row [B, L, R], and the gain of its columns, [R] or [B, R]."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        if self.spectrum == "valid":
            basis, frequencies = self._basis(lengths, x.shape[1], dtype)
            return basis, mask_gain(frequencies, self.theta, self.mask, self.tau)
        basis, frequencies, gain = self._padded_basis(x.shape[1], dtype, x.device)
        return basis, gain if self.mask == "hard" else mask_gain(frequencies, self.theta, self.mask, self.tau)

    def _basis(self, lengths: Tensor, seqlen: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """One basis [L, R] for each of `lengths`, and the frequencies of its columns [R]."""
        columns = n_columns(seqlen, self._theta if self.mask == "hard" else None, self.kind)
        basis = row_basis(lengths, seqlen, columns, self.kind, dtype)
        return basis, column_frequencies(lengths, columns, self.kind, dtype)

    def _padded_basis(self, seqlen: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """The basis over all L slots, the frequencies of its columns and their hard gain; they are made once."""

        def make() -> tuple[Tensor, Tensor, Tensor]:
            lengths = torch.full((1,), seqlen, dtype=torch.int64, device=device)
            basis, frequencies = self._basis(lengths, seqlen, dtype)
            return basis[0], frequencies[0], mask_gain(frequencies[0], self._theta, "hard", self.tau)

        key = (seqlen, dtype, device)
        if torch.compiler.is_compiling() or key in self._kept:
            return self._kept[key] if key in self._kept else make()
        with torch.inference_mode(False):  # what is made in inference mode could not be used in training
            made = make()
        if type(made[0]) is Tensor:  # and not a tracer's stand-in
            self._kept = {key: made}  # of one length: models see one
        return made

    def multiplies(self, seqlen: int) -> bool:
        """Is it a product with `columns`, rather than nothing or a fast transform?"""
        return not (self.is_identity or self._by_transform(seqlen))

    def _by_transform(self, seqlen: int) -> bool:
        """Is the sequence so long that fast transforms beat matrix products?"""
        columns = n_columns(seqlen, self._theta if self.mask == "hard" else None, self.kind)
        return self.kind == "fourier" and self.spectrum == "padded" and columns >= ops.FFT_COLUMNS

    def _bin_gain(self, x: Tensor) -> Tensor:
        """The gain of each rfft bin, [L // 2 + 1]."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        bins = torch.arange(x.shape[1] // 2 + 1, device=x.device, dtype=dtype) / x.shape[1]
        return mask_gain(bins, self.theta, self.mask, self.tau)
