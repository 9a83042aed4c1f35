"""The bases as matrices against the fast transforms, and the filter module around them."""

from __future__ import annotations

import math

import pytest
import torch

from fastm2rec import M2RecConfig
from fastm2rec.basis import column_frequencies, mask_gain, n_columns, row_basis
from fastm2rec.config import Basis, Mask, Spectrum
from fastm2rec.reference.spectral_projection import spectral_filter
from fastm2rec.spectral import SpectralFilter

LENGTHS = [1, 2, 3, 7, 50, 63, 64, 200, 201]
BASES: list[Basis] = ["fourier", "dct"]


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("n", LENGTHS)
def test_columns_are_orthonormal_and_complete(n: int, kind: Basis) -> None:
    V = row_basis(torch.tensor([n]), n, n_columns(n, None, kind), kind, torch.float64)[0]
    assert V.shape == (n, n)
    torch.testing.assert_close(V.T @ V, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", LENGTHS)
def test_fourier_columns_are_the_bins_of_rfft(n: int) -> None:
    V = row_basis(torch.tensor([n]), n, n, "fourier", torch.float64)[0]
    frequency = column_frequencies(torch.tensor([n]), n, "fourier", torch.float64)[0]
    power = torch.fft.rfft(V, dim=0).abs()  # [bins, columns]
    assert torch.equal(power.argmax(dim=0), (frequency * n).round().long())
    assert torch.allclose(power.sort(dim=0).values[:-1], torch.zeros((), dtype=torch.float64), atol=1e-10)


def test_phases_stay_exact_for_long_sequences() -> None:
    n = 8191
    V32 = row_basis(torch.tensor([n]), n, 101, "fourier", torch.float32)[0]
    V64 = row_basis(torch.tensor([n]), n, 101, "fourier", torch.float64)[0]
    assert (V32.double() - V64).abs().max() < 1e-6 * math.sqrt(2 / n)


@pytest.mark.parametrize(
    ("n", "theta", "bins"), [(50, 0.1, 6), (200, 0.1, 21), (30, 0.1, 4), (10, 0.3, 4), (7, 0.1, 1), (201, 0.5, 101)]
)
def test_the_kept_bins_are_those_at_or_below_theta(n: int, theta: float, bins: int) -> None:
    kept = torch.arange(n // 2 + 1).double() / n <= theta + 1e-12
    assert int(kept.sum()) == bins
    columns = n_columns(n, theta, "fourier")
    assert columns == min(2 * bins - 1, n)
    gain = mask_gain(column_frequencies(torch.tensor([n]), n, "fourier", torch.float64)[0], theta, "hard", 0.02)
    assert int(gain.sum()) == columns
    assert gain[:columns].all()


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("mask", ["hard", "soft", "straight_through"])
@pytest.mark.parametrize("spectrum", ["padded", "valid"])
@pytest.mark.parametrize("theta", [0.0, 0.1, 0.27, 0.487])
def test_filter_is_the_references(kind: Basis, mask: Mask, spectrum: Spectrum, theta: float) -> None:
    if mask != "hard" and theta == 0:
        theta = 0.01
    lengths = torch.tensor([1, 2, 7, 8, 50, 63, 64, 33])
    x = torch.randn(len(lengths), 64, 3, dtype=torch.float64)
    x[torch.arange(64) >= lengths[:, None]] = 0
    config = M2RecConfig(theta=theta, mask=mask, tau=0.03, basis=kind, spectrum=spectrum)
    module = SpectralFilter(config).double()
    expected = spectral_filter(x, theta, mask=mask, tau=0.03, basis=kind, spectrum=spectrum, lengths=lengths)
    torch.testing.assert_close(module(x, lengths), expected, rtol=0, atol=1e-7 if mask != "hard" else 1e-12)


@pytest.mark.parametrize("mask", ["soft", "straight_through"])
def test_theta_is_learned_inside_its_range(mask: Mask) -> None:
    module = SpectralFilter(M2RecConfig(theta=0.1, mask=mask)).double()
    assert float(torch.as_tensor(module.theta).detach()) == pytest.approx(0.1, abs=1e-7)
    x = torch.randn(2, 50, 4, dtype=torch.float64)
    module(x, torch.tensor([50, 50])).square().sum().backward()
    # More cutoff, more energy: the gradient must be there and point up.
    assert module.theta_logit.grad is not None
    assert module.theta_logit.grad > 0
    with torch.no_grad():
        module.theta_logit.fill_(80.0)
    assert 0 <= float(torch.as_tensor(module.theta).detach()) <= 0.5


def test_hard_filter_has_no_parameter_and_theta_half_is_the_identity() -> None:
    module = SpectralFilter(M2RecConfig(theta=0.5))
    x = torch.randn(2, 9, 4)
    assert module(x, torch.tensor([9, 3])) is x
    assert not list(module.parameters())


def test_valid_rows_do_not_feel_their_padding() -> None:
    module = SpectralFilter(M2RecConfig(spectrum="valid", mask="soft"))
    x = torch.randn(1, 13, 4)
    short = module(x, torch.tensor([13]))
    longer = torch.cat([x, torch.randn(1, 20, 4)], dim=1)  # even garbage behind the row does not matter
    padded = module(longer, torch.tensor([13]))
    torch.testing.assert_close(padded[:, :13], short, rtol=0, atol=1e-6)
    assert not padded[:, 13:].any()
