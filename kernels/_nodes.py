"""Exponentials with learned rates as sums of a few fixed ones: the fit, its error, and when it may be used.

exp(-a T) = sum_q l_q(a) exp(-alpha_q T) + error for all T >= 0, with alpha_q = alpha_0 sqrt(2)^q. In units of alpha_0,
one per channel, all channels have the same nodes, so one least-squares problem on a grid of T serves every a. The
error is uniform in T, hence independent of the sequence length, and known here, before a kernel runs.

Coefficients are float16, the operands of a tensor-core product. Rounding each at the end would cost 5e-4; instead they
are rounded one after the other, and the remaining ones are fitted again to make up for it, which costs nothing
measurable: neighbouring nodes are nearly collinear.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

EXPONENTIALS = ("exact", "nodes", "auto")

RATIO = math.sqrt(2.0)
# Even, so that the two chains of squares, from alpha_0 and alpha_1, are equally long. 16 nodes span a factor of 181.
COUNTS = (4, 6, 8, 10, 12, 14, 16)
# Keeps the coefficients small (their sum stays below 15) where several combinations fit alike.
RIDGE = 1e-12


@dataclass(frozen=True)
class Nodes:
    """A fit of one state matrix; make it once where the weights are loaded, and again whenever they change.

    Args:
        rates: alpha_0 of each channel, [E] float32.
        coefficients: l_q, [K, N, E] float16.
        error: max over T >= 0, channels and states of |exp(-a T) - its approximation|, in the kernel's arithmetic.
        tolerance: the largest error that is accepted.
    """

    rates: Tensor
    coefficients: Tensor
    error: float
    tolerance: float

    @property
    def fits(self) -> bool:
        return self.error <= self.tolerance

    def to(self, device: torch.device | str) -> Nodes:
        """The same fit on another device."""
        return Nodes(self.rates.to(device), self.coefficients.to(device), self.error, self.tolerance)


def accepted(exponentials: str, nodes: Nodes | None) -> Nodes | None:
    """The nodes to compute with, None for exact exponentials.

    Raises:
        ValueError: nodes were asked for by name and there are none, or their error exceeds their tolerance.
    """
    if exponentials == "exact":
        return None
    if exponentials == "auto":
        return nodes if nodes is not None and nodes.fits else None
    if nodes is None:
        raise ValueError("nodes: expected fit_nodes(A) with exponentials='nodes', got None")
    if not nodes.fits:
        raise ValueError(
            f"nodes: expected a fit with an error of at most {nodes.tolerance:.1e}, got {nodes.error:.1e} "
            f"with {len(nodes.coefficients)} nodes; exponentials='auto' falls back to exact ones"
        )
    return nodes


def fit_nodes(A: Tensor, tolerance: float = 1e-4) -> Nodes:
    """As few nodes as reach the tolerance, or the best fit there is if none does; float64, on the CPU.

    Args:
        A: the state matrix (dim, dstate), negative real, any floating dtype.
        tolerance: the largest accepted error of an exponential. The default is far below bfloat16's rounding, and
            takes 10 nodes for rates from 1 to 16, 12 for 1 to 32.

    Returns:
        The fit, on A's device; its error is infinite where A has entries that are not negative or not finite.
    """
    a = -A.detach().to("cpu", torch.float64)
    if not bool(((a > 0) & a.isfinite()).all()):
        no_fit = torch.zeros(COUNTS[0], *a.t().shape, dtype=torch.float16, device=A.device)
        return Nodes(torch.ones(len(a), dtype=torch.float32, device=A.device), no_fit, math.inf, tolerance)
    low, high = a.amin(1), a.amax(1)
    best: Nodes | None = None
    for count in COUNTS:
        if count != COUNTS[-1] and RATIO ** (count - 1) < float((high / low).max()):
            continue
        # The nodes reach as far below the smallest rate of a channel as above its largest.
        rates = (low * high / RATIO ** (count - 1)).sqrt().float()
        scaled = (a / rates.double()[:, None]).t().reshape(-1)
        coefficients, error = _fit(scaled, count)
        if best is None or error < best.error:
            stored = coefficients.reshape(count, A.shape[1], A.shape[0]).to(torch.float16)
            best = Nodes(rates.to(A.device), stored.to(A.device), error, tolerance)
        if best.fits:
            break
    assert best is not None
    return best


def _fit(rates: Tensor, count: int) -> tuple[Tensor, float]:
    """Coefficients [count, len(rates)], exact in float16, for rates in units of alpha_0; and their largest error."""
    # The slowest of nodes and rates sets when all is over.
    end = 60.0 / min(1.0, float(rates.min()))
    T = _times(end, 400)
    design = torch.exp(-T[:, None] * RATIO ** torch.arange(count, dtype=torch.float64))
    left = torch.exp(-T[:, None] * rates)
    weight = math.sqrt(RIDGE * len(T))
    rounded = torch.empty(count, len(rates), dtype=torch.float64)
    for q in range(count):
        penalised = torch.cat([design[:, q:], weight * torch.eye(count - q, dtype=torch.float64)])
        # The row of the least-squares solution that is rounded next.
        coefficients = torch.linalg.pinv(penalised, rtol=1e-15)[0, : len(T)] @ left
        rounded[q] = coefficients.to(torch.float16).double()
        left = left - design[:, q : q + 1] * rounded[q]
    # A finer grid than the fit's, so that the error between its points is seen.
    T = _times(end, 1501)
    error = float((_by_squaring(T, count) @ rounded - torch.exp(-T[:, None] * rates)).abs().max())
    return rounded, error if math.isfinite(error) else math.inf


def _times(end: float, points: int) -> Tensor:
    """0, and from where all exponentials are still 1, logarithmically, to `end`."""
    later = torch.logspace(-4.5, math.log10(end), points, dtype=torch.float64)
    return torch.cat([torch.zeros(1, dtype=torch.float64), later])


def _by_squaring(T: Tensor, count: int) -> Tensor:
    """exp(-alpha_q T) [len(T), count] as the kernel makes them: in float32, each the square of the one two before."""
    powers = [torch.exp(-T).float(), torch.exp(-RATIO * T).float()]
    while len(powers) < count:
        powers.append(powers[-2] * powers[-2])
    return torch.stack(powers, dim=1).double()
